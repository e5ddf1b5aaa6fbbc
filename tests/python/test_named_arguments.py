# SPDX-License-Identifier: Apache-2.0
"""A method of a compiled class says which argument is of a wrong type, and has done nothing."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import pytest
import quire
from quire import _core

KEY = bytes(32)
PROMPT = np.arange(20, dtype=np.int32)
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32", "block_size": 4}
FIGURES = ("seconds_per_token", "seconds_per_token_pair", "bytes_per_second", "seconds_per_swap")
ON_GPU = {"stream"}  # refused on the CPU, whatever it is
CLASSES = [kind for kind in vars(_core).values() if isinstance(kind, type)]


class World:
    """One of everything, between a step and its commit."""

    def __init__(self, folder: Any, is_recorded: bool = False) -> None:
        self.store = quire.HostStore(capacity_bytes=1000, block_bytes=100)
        self.manager: Any = quire.KVCacheManager(32, 4, num_host_blocks=8)
        if is_recorded:
            path = str(folder / "calls")
            self.manager = quire.RecordedKVCacheManager(path, 32, 4, num_host_blocks=8)
        self.seq = self.manager.create(PROMPT)
        self.batch = self.manager.step([self.seq], [20])
        self.scheduler = quire.Scheduler(quire.KVCacheManager(32, 4))
        self.attention = quire.Attention(**ATTENTION)
        self.plan = self.attention.plan(self.batch.block_table, self.batch.seq_lens)
        self.folder = folder

    def state(self) -> tuple[object, ...]:
        self.manager.validate()
        self.scheduler.validate()
        counts = self.scheduler.num_waiting, self.scheduler.num_running
        return self.manager.snapshot(), *counts, self.store.stats(), quire.num_threads()

    def calls(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        """What is right: of each function with arguments, the function and all of them."""
        m, s, a, seq = self.manager, self.scheduler, self.attention, self.seq
        manager = {
            **{"num_blocks": 8, "block_size": 4, "prefix_caching": True, "async_depth": 0},
            **{"eviction": "lru", "event_capacity": 0, "num_host_blocks": 0, "groups": []},
        }
        scheduler = {
            **{"manager": m, "max_tokens_per_step": 64, "max_seqs": 4, "watermark": 0.5},
            **{"prefix_window": 1, "max_overtakes": 1, "preemption": None},
        }
        log = {
            **{key: value for key, value in manager.items() if key != "groups"},
            **{"path": str(self.folder / "log"), "eviction": 0, "groups": []},
        }
        cache = np.zeros((2, 32, 4, 2, 8), np.float32)
        rows = np.zeros((1, 4, 8), np.float32)
        tensors = {"q": rows, "k_cache": cache[0], "v_cache": cache[1], "out": rows.copy()}
        options = {"lse": None, "sinks": None, "alibi_slopes": None, "k_scale": 1, "v_scale": 1}
        tables = {"block_table": self.batch.block_table, "seq_lens": self.batch.seq_lens}
        both = {"capacity_bytes": 1000, "block_bytes": 100, "max_pending": 4}
        places = {"pools": [cache], "blocks": [1]}
        request = {"token_ids": PROMPT, "salt": "a", "priority": 1}
        of_seq = {"seq": seq}
        seqs = {"seqs": [seq]}
        file_store = {**both, "path": str(self.folder / "store"), "identity": "b"}
        groups = {"kind": "sliding_window", "window": 4, "chunk": None}
        costs = {**dict.fromkeys(FIGURES, 1.0), "bytes_per_block": 1}
        desc = {
            **ATTENTION,
            **{"kv_dtype": None, "causal": True, "window": (-1, -1), "softcap": 0.0},
            **{"scale": None, "device": "cpu", "head_dim_v": None},
        }
        ranges = {"sources": np.zeros((0, 2), np.int64), "destinations": np.zeros((0, 2), np.int64)}
        part = {"plan": self.plan, "ith": 0, "nth": 1, "workspace": np.zeros(1 << 16, np.uint8)}
        return {
            "KVCacheManager": (quire.KVCacheManager, manager),
            "KVCacheManager.create": (m.create, {**request, "ttl": 1.0}),
            "KVCacheManager.fork": (m.fork, {**of_seq, "n": 2}),
            "KVCacheManager.truncate": (m.truncate, {**of_seq, "num_tokens": 5}),
            "KVCacheManager.match": (m.match, {"token_ids": PROMPT, "salt": "a"}),
            "KVCacheManager.pin": (m.pin, {"what": PROMPT, "salt": "a"}),
            "KVCacheManager.unpin": (m.unpin, {"what": PROMPT, "salt": "a"}),
            "KVCacheManager.free": (m.free, seqs),
            "KVCacheManager.step": (m.step, {**seqs, "num_new_tokens": [20], "lookahead": 0}),
            "KVCacheManager.commit": (m.commit, {**seqs, "sampled": [1]}),
            "KVCacheManager.retire": (m.retire, {"ticket": 1}),
            "KVCacheManager.restore": (m.restore, {"snapshot": "{}"}),
            "KVCacheManager.set_time": (m.set_time, {"ns": 5}),
            "KVCacheManager.attach_store": (m.attach_store, {"store": self.store}),
            "KVCacheManager.fetch": (m.fetch, of_seq),
            "KVCacheManager.fetched": (m.fetched, {**of_seq, "num_blocks": 0}),
            "KVCacheManager.swap_out": (m.swap_out, of_seq),
            "KVCacheManager.swap_in": (m.swap_in, of_seq),
            "KVCacheManager.is_swapped_out": (m.is_swapped_out, of_seq),
            "LayerGroup": (quire.LayerGroup, groups),
            "PreemptionCosts": (quire.PreemptionCosts, costs),
            "Scheduler": (quire.Scheduler, scheduler),
            "Scheduler.add": (s.add, {**request, "max_new_tokens": 3, "tenant": "t"}),
            "Scheduler.commit": (s.commit, {"sampled": [1]}),
            "Scheduler.finish": (s.finish, {"request_id": 0}),
            "KVStore.put": (self.store.put, {"key": KEY, "payload": bytes(100)}),
            "KVStore.get": (self.store.get, {"key": KEY, "out": bytearray(100)}),
            "KVStore.contains": (self.store.contains, {"key": KEY}),
            "KVStore.erase": (self.store.erase, {"key": KEY}),
            "HostStore": (quire.HostStore, both),
            "FileStore": (quire.FileStore, file_store),
            "CallLogWriter": (_core.CallLogWriter, log),
            "Attention": (quire.Attention, desc),
            "Attention.plan": (
                a.plan,
                {**tables, "cu_seqlens_q": None, "max_total_q": None, "stream": None},
            ),
            "Attention.run": (a.run, {"plan": self.plan, **tensors, **options, "stream": None}),
            "Attention.run_part": (a.run_part, {**part, **tensors, **options}),
            "Attention.workspace_size": (a.workspace_size, {"plan": self.plan}),
            "chain_keys": (
                quire.chain_keys,
                {"token_ids": PROMPT, "block_size": 4, "salt": None},
            ),
            "set_num_threads": (quire.set_num_threads, {"count": 1}),
            "replay_calls": (quire.replay_calls, {"path": "log"}),
            "export_blocks": (quire.export_blocks, places),
            "import_blocks": (quire.import_blocks, places),
            "pair_ranges": (quire.pair_ranges, ranges),
        }


@pytest.fixture
def world(tmp_path: Any) -> World:
    return World(tmp_path)


def parameters(function: Any) -> dict[str, tuple[str, bool]]:
    """Annotation of each parameter of a compiled function, and whether it has a default."""
    found: dict[str, tuple[str, bool]] = {}
    for text, *_ in function.__nb_signature__:
        node = ast.parse(text.replace("\\", "").replace("@", "") + ": ...").body[0]
        assert isinstance(node, ast.FunctionDef)
        arguments = [*node.args.args, *node.args.kwonlyargs]
        found |= {a.arg: (ast.unparse(a.annotation or ast.Constant(...)), False) for a in arguments}
    found.pop("self", None)
    return found


def functions() -> dict[str, Any]:
    """All compiled functions of classes, by name, that take arguments."""
    found = {}
    for kind in CLASSES:
        for name, function in vars(kind).items():
            function = getattr(function, "__func__", function)
            if hasattr(function, "__nb_signature__") and parameters(function):
                found[kind.__name__ + (f".{name}" if name != "__init__" else "")] = function
    return found


def test_the_table_has_every_method_and_every_argument(world: World) -> None:
    calls = world.calls()
    internal = {"CallLogWriter.write"}
    assert set(functions()) - internal == {name for name in calls if name[0].isupper()}
    for name, function in functions().items():
        if name not in internal:
            assert set(calls[name][1]) == set(parameters(function)), name


def errors(
    name: str, call: Any, arguments: dict[str, Any], wrong: object, spared: set[str]
) -> list[str]:
    """What is not as it should be when one argument after the other is `wrong`."""
    function = name.rpartition(".")[2]
    found = []
    for argument in set(arguments) - spared:
        try:
            call(**{**arguments, argument: wrong})
            found.append(f"{name}({argument}=...) was taken")
        except Exception as error:
            # run() and run_part() name their tensors as paged_attention() does.
            is_named = any(
                str(error).startswith(f"{label}: {argument}: expected")
                for label in (function, "paged_attention")
            )
            got = type(wrong).__name__
            if type(error) is not TypeError or not is_named or got not in str(error):
                found.append(f"{name}({argument}=...): {error!r}")
    return found


def test_every_argument_of_a_wrong_type_is_named(world: World) -> None:
    before = world.state()
    found = []
    for name, (call, arguments) in world.calls().items():
        found += errors(name, call, arguments, object(), ON_GPU)
    assert not found, "\n".join(found)
    assert world.state() == before


def test_a_recorded_manager_refuses_alike(tmp_path: Any) -> None:
    world = World(tmp_path, is_recorded=True)
    before = world.state()
    found = []
    for name, (call, arguments) in world.calls().items():
        if name.startswith("KVCacheManager."):
            found += errors(name, call, arguments, object(), set())
    assert not found, "\n".join(found)
    assert world.state() == before
    world.manager.free([world.seq])
    num_calls, difference = quire.replay_calls(str(tmp_path / "calls"))
    assert (num_calls >= 3, difference) == (True, None)  # create, step, free


def test_none_is_refused_by_name_where_it_has_no_meaning(world: World) -> None:
    before = world.state()
    found = []
    for name, (call, arguments) in world.calls().items():
        function = functions().get(name) or getattr(_core, name.rpartition(".")[2])
        takes_none = {
            argument
            for argument, (annotation, _) in parameters(function).items()
            if "None" in annotation
        }
        found += errors(name, call, arguments, None, takes_none)
    assert not found, "\n".join(found)
    assert world.state() == before


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda w: w.manager.fork(w.seq, "3"),
            TypeError,
            "fork: n: expected int, got str",
        ),
        (lambda w: w.manager.fork("3"), TypeError, "fork: seq: expected Sequence, got str"),
        (lambda w: w.manager.retire(1.5), TypeError, "retire: ticket: expected int, got float"),
        (
            lambda w: w.manager.create(PROMPT, ttl="soon"),
            TypeError,
            "create: ttl: expected float | None, got str",
        ),
        (
            lambda w: quire.KVCacheManager(8, 4, groups=["full"]),
            TypeError,
            "KVCacheManager: groups: expected list[LayerGroup], got list",
        ),
        (
            lambda w: quire.KVCacheManager(8, 4, 1),
            TypeError,
            "KVCacheManager: prefix_caching: expected bool, got int",
        ),
        (
            lambda w: quire.Scheduler(w.store),
            TypeError,
            "Scheduler: manager: expected KVCacheManager, got HostStore",
        ),
        (
            lambda w: w.scheduler.add(PROMPT, 1 << 40),
            ValueError,
            "add: max_new_tokens: expected int of fewer bits, got one out of range",
        ),
        (
            lambda w: w.attention.run("plan", None, None, None),
            TypeError,
            "run: plan: expected AttentionPlan, got str",
        ),
    ],
)
def test_messages(world: World, call: Any, kind: type[Exception], message: str) -> None:
    before = world.state()
    with pytest.raises(kind) as error:
        call(world)
    assert str(error.value) == message
    assert world.state() == before


def test_what_converts_is_taken_as_before(world: World) -> None:
    children = world.manager.fork(world.seq, np.int64(2))
    assert len(children) == 2
    assert world.scheduler.add(PROMPT, np.int32(3)) == 0
    assert world.manager.create(PROMPT, ttl=3).num_tokens == 20


def test_a_recorded_manager_names_a_number_that_is_too_large(tmp_path):
    world = World(tmp_path, is_recorded=True)
    manager, seq, before = world.manager, world.seq, world.state()
    for call, name in (
        (lambda: manager.create(PROMPT, priority=2**40), "create: priority"),
        (lambda: manager.fork(seq, 2**40), "fork: n"),
        (lambda: manager.truncate(seq, 2**70), "truncate: num_tokens"),
        (lambda: manager.step([seq], [1], lookahead=2**70), "step: lookahead"),
        (lambda: manager.retire(2**70), "retire: ticket"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            call()
    assert world.state() == before
