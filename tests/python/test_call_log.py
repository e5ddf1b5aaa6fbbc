# SPDX-License-Identifier: Apache-2.0
"""A manager recorded from Python is replayed by the core, result by result."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import quire
from hypothesis import given, settings
from hypothesis import strategies as st


def drive(manager, rng, num_calls):
    """Calls of every kind, some of them wrong."""
    live = []
    for _ in range(num_calls):
        action = rng.integers(10)
        if not live or action < 2:
            tokens = rng.integers(0, 2, rng.integers(1, 30)).astype(np.int32)
            salt = [None, "", "a"][rng.integers(3)]
            live.append(manager.create(tokens, salt) if len(live) < 8 else manager.fork(live[0]))
        elif action < 6:
            todo = [seq.num_tokens - seq.num_computed_tokens for seq in live]
            batch = manager.step(live, todo)
            if batch is None:
                manager.free([live.pop()])
                continue
            sampled = rng.integers(0, 2, len(live)).astype(np.int32)
            forms = [None, sampled, [sampled[: i % 3] for i in range(len(live))]]
            manager.commit(live, forms[rng.integers(3)])
        elif action == 6:
            seq = live[rng.integers(len(live))]
            manager.truncate(seq, int(rng.integers(1, seq.num_tokens + 1)))
        elif action == 7:
            manager.free([live.pop(rng.integers(len(live)))])
        elif action == 8:
            gone = live.pop()
            manager.free([gone])
            with pytest.raises(ValueError):
                manager.fork(gone)
            with pytest.raises(ValueError):
                manager.free([gone])
        else:
            with contextlib.suppress(ValueError):
                manager.truncate(live[0], 0)
            with contextlib.suppress(ValueError):
                manager.create([])
            with contextlib.suppress(ValueError):
                manager.retire(1)


def test_every_call_and_every_form_of_its_arguments(tmp_path):
    path = str(tmp_path / "calls")
    manager = quire.RecordedKVCacheManager(path, 40, 4)
    system = np.arange(8, dtype=np.int32)
    seq = manager.create(np.append(system, np.int32(9)), priority=7)
    ids = np.array([seq.id])
    assert manager.step(ids, [9], lookahead=6) is not None
    manager.commit(ids, [5])
    manager.commit([seq], [[6, 7]])
    children = manager.fork(seq, 3)
    assert manager.fork(seq, 0) == []
    assert manager.pin(system) == 8 and manager.pin(seq) == 8 and manager.unpin(seq) == 8
    with pytest.raises(ValueError, match="int64 array"):
        manager.step(ids.astype(np.int32), [1])
    with pytest.raises(ValueError, match="fork: n"):
        manager.fork(seq, -1)
    with pytest.raises(ValueError, match="priority"):
        manager.create([1], priority=101)
    short = manager.create([3] * 8, "salt", ttl=0.0)
    assert manager.step([short], [8]) is not None
    manager.commit([short])
    manager.free(np.array([short.id, *(child.id for child in children)]))
    with pytest.raises(ValueError):
        manager.free(ids.astype(np.float64))
    assert manager.clear_cache() == 2
    assert manager.unpin(system) == 8
    manager.free(ids)
    num_calls, difference = quire.replay_calls(path)
    assert difference is None
    # The times of calls since the one with a time to live are calls of their own.
    assert num_calls == 19 + 6


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_calls_replay_with_the_same_results(tmp_path_factory, data):
    path = str(tmp_path_factory.mktemp("log") / "calls")
    integer = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    others = data.draw(
        st.sampled_from(
            [[], [quire.LayerGroup("sliding_window", window=5)], [quire.LayerGroup("state")]]
        )
    )
    manager = quire.RecordedKVCacheManager(
        path,
        integer(8, 30),
        integer(1, 4),
        eviction=data.draw(st.sampled_from(["lru", "reuse_lru"])),
        num_host_blocks=integer(0, 12),
        groups=[quire.LayerGroup(), *others],
    )
    live: list[quire.Sequence] = []
    for _ in range(integer(1, 40)):
        with contextlib.suppress(ValueError):
            surface_call(manager, live, integer)
    manager.validate()
    assert quire.replay_calls(path)[1] is None


def surface_call(manager, live, integer):
    """One call, of a kind and with arguments that `integer` chooses."""
    action = integer(0, 11) if live else 0
    pick = live[integer(0, len(live) - 1)] if live else None
    if action == 0:
        options = [{}, {"priority": integer(0, 3)}, {"ttl": integer(0, 1) / 1e5}][integer(0, 2)]
        prompt = np.full(integer(1, 14), integer(0, 1), np.int32)
        live.append(manager.create(prompt, [None, "a"][integer(0, 1)], **options))
    elif action < 4:
        todo = [seq.num_tokens - seq.num_computed_tokens for seq in live]
        ids = np.array([seq.id for seq in live])
        if manager.step([live, ids][integer(0, 1)], todo, lookahead=integer(0, 3)) is not None:
            manager.commit([live, ids][integer(0, 1)], np.full(len(live), integer(0, 1), np.int32))
    elif action == 4:
        live.extend(manager.fork(pick, integer(0, 2)))
    elif action == 5:
        manager.truncate(pick, integer(0, pick.num_tokens))
    elif action == 6:
        manager.free([pick])
        live.remove(pick)
    elif action == 7:
        manager.pin([pick, pick.token_ids][integer(0, 1)])
    elif action == 8:
        manager.unpin([pick, pick.token_ids][integer(0, 1)])
    elif action == 9:
        manager.swap_in(pick) if manager.is_swapped_out(pick) else manager.swap_out(pick)
    elif action == 10:
        manager.clear_cache()
    else:
        manager.fetch(pick)


@pytest.mark.parametrize("seed", range(4))
def test_replay_finds_the_same_results(tmp_path, seed):
    path = str(tmp_path / "calls")
    manager = quire.RecordedKVCacheManager(path, 24, 4, prefix_caching=seed != 1)
    drive(manager, np.random.default_rng(seed), 300)
    manager.validate()
    num_calls, difference = quire.replay_calls(path)
    assert difference is None
    assert num_calls > 300


def test_async_and_reading_through(tmp_path):
    path = str(tmp_path / "calls")
    manager = quire.RecordedKVCacheManager(path, 24, 4, async_depth=2)
    seq = manager.create(np.arange(10, dtype=np.int32))
    batch = manager.step([seq], [10])
    manager.free([seq])
    assert manager.stats().deferred_refs == 3 and manager.num_used_blocks == 3
    manager.retire(batch.ticket)
    assert manager.num_used_blocks == 0 and manager.match([0, 1, 2, 3]) == 0
    assert quire.replay_calls(path) == (4, None)


@pytest.mark.parametrize("eviction", ["lru", "reuse_lru"])
def test_swaps_and_fetches_replay_without_the_stores(tmp_path, eviction):
    path = str(tmp_path / "calls")
    manager = quire.RecordedKVCacheManager(
        path, 12, 4, eviction=eviction, event_capacity=8, num_host_blocks=6
    )
    cache = quire.KVCache(1, 12, 4, 1, 8, "float32")
    near = quire.HostStore(3 * cache.block_bytes, cache.block_bytes)
    far = quire.FileStore(str(tmp_path / "store"), 1 << 20, cache.block_bytes, "a model")
    tiers = quire.KVTiers(manager, cache, [near, far])
    rng = np.random.default_rng(5)
    prompts = [np.full(17, i, np.int32) for i in range(4)]
    num_fetched = num_swapped = 0
    for _ in range(60):
        seq = manager.create(prompts[rng.integers(4)])
        num_fetched += tiers.fetch(seq)
        assert manager.step([seq], [seq.num_tokens - seq.num_computed_tokens]) is not None
        tiers.offload()
        manager.commit([seq], np.array([1], np.int32))
        if rng.integers(2):
            assert manager.swap_out(seq).shape == (5, 2)
            idle = manager.create([1])
            assert manager.swap_out(idle).shape == (0, 2)
            manager.free([idle])
            with pytest.raises(ValueError):
                manager.swap_out(seq)
            other = manager.create(np.arange(40, 57, dtype=np.int32))
            assert manager.step([other], [17 - other.num_cached_tokens]) is not None
            tiers.offload()
            manager.commit([other])
            assert manager.swap_out(other) is None  # one host block is left
            manager.free([other])
            num_swapped += len(manager.swap_in(seq))
            tiers.offload()
        manager.free([seq])
        tiers.drain()
    manager.validate()
    assert num_fetched >= 60 and num_swapped >= 20
    assert manager.stats().file_hit_tokens > 0
    num_calls, difference = quire.replay_calls(path)
    assert difference is None
    assert num_calls > 360


def test_fetches_that_are_refused_or_find_no_room(tmp_path):
    path = str(tmp_path / "calls")
    manager = quire.RecordedKVCacheManager(path, 4, 4)
    store = quire.HostStore(1 << 16, 64)
    manager.attach_store(store)
    with pytest.raises(ValueError, match="one store a tier"):
        manager.attach_store(store)
    prompt = np.arange(13, dtype=np.int32)
    for key in quire.chain_keys(prompt, 4):
        store.put(key, np.zeros(64, np.uint8)).wait()
    with pytest.raises(ValueError):
        manager.fetched(manager.create([1]), 0)
    holder = manager.create(np.arange(20, 28, dtype=np.int32))
    assert manager.step([holder], [8]) is not None
    with pytest.raises(ValueError):
        manager.fetch(holder)
    manager.commit([holder])
    seq = manager.create(prompt)
    assert manager.fetch(seq) is None
    manager.free([holder])
    assert len(manager.fetch(seq)) == 3
    with pytest.raises(ValueError):
        manager.fetched(seq, 4)
    manager.fetched(seq, 2)
    assert seq.num_cached_tokens == 8
    assert quire.replay_calls(path) == (14, None)


def test_layer_groups(tmp_path):
    path = str(tmp_path / "calls")
    groups = [quire.LayerGroup(), quire.LayerGroup("sliding_window", window=6)]
    groups.append(quire.LayerGroup("state"))
    manager = quire.RecordedKVCacheManager(path, 60, 4, groups=groups)
    drive(manager, np.random.default_rng(2), 300)
    manager.validate()
    num_calls, difference = quire.replay_calls(path)
    assert difference is None
    assert num_calls > 300


def test_a_difference_is_named(tmp_path):
    path = tmp_path / "calls"
    manager = quire.RecordedKVCacheManager(str(path), 24, 4)
    manager.create([1, 2, 3])
    manager.create([1, 2])
    log = path.read_bytes()
    path.write_bytes(log[:-1] + bytes([log[-1] ^ 1]))
    num_calls, difference = quire.replay_calls(str(path))
    assert num_calls == 1
    assert difference.startswith("call 1, create: expected done (check ")


def test_files_that_are_no_log(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="replay: log: expected a call log of version 3"):
        quire.replay_calls(str(tmp_path / "empty"))
    with pytest.raises(OSError, match="nowhere"):
        quire.replay_calls(str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="folder"):
        quire.RecordedKVCacheManager(str(tmp_path / "folder" / "x"), 4, 4)
