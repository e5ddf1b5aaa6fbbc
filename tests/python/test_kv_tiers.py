# SPDX-License-Identifier: Apache-2.0
"""KVTiers with a real cache: whatever leaves the pool comes back with the same bits, or is computed
again; stores that are full, closed, torn or gone lose copies, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import quire

SIZE, LAYERS, HEADS, DIM = 4, 2, 2, 8


class Engine:
    """A model of two layers whose K and V depend on token and position alone."""

    def __init__(self, num_blocks, stores=(), num_host_blocks=0, dtype="float32", manager=None):
        self.manager = manager or quire.KVCacheManager(
            num_blocks, SIZE, num_host_blocks=num_host_blocks
        )
        self.cache = quire.KVCache(LAYERS, num_blocks, SIZE, HEADS, DIM, dtype)
        self.tiers = quire.KVTiers(self.manager, self.cache, stores)

    def create(self, tokens):
        seq = self.manager.create(np.array(tokens, np.int32))
        self.tiers.fetch(seq)
        return seq

    def compute(self, *seqs, sampled=None):
        """False: out of blocks. Computes all known tokens, and then knows the sampled ones."""
        counts = [seq.num_tokens - seq.num_computed_tokens for seq in seqs]
        batch = self.manager.step(list(seqs), counts)
        if batch is None:
            return False
        self.tiers.offload()
        tokens = np.concatenate([seq.token_ids[seq.num_computed_tokens :] for seq in seqs])
        for layer in range(LAYERS):
            k, v = self.cache.k(layer), self.cache.v(layer)
            quire.copy_blocks(k, v, batch.copies)
            quire.append_kv(*self.kv(tokens, batch.positions, layer), k, v, batch.slot_mapping)
        self.manager.commit(list(seqs), sampled)
        return True

    def kv(self, tokens, positions, layer):
        salt = np.arange(HEADS * DIM).reshape(HEADS, DIM)
        x = (tokens * 7 + positions * 13 + layer)[:, None, None] + salt
        dtype = self.cache.k(0).dtype
        return np.sin(x).astype(dtype), np.cos(x).astype(dtype)

    def output(self, seq):
        """Attention of a fixed query over a sequence, all layers."""
        length = seq.num_computed_tokens
        table = seq.block_table[None, : -(-length // SIZE)]
        q = np.sin(np.arange(4 * DIM)).reshape(1, 4, DIM).astype(self.cache.k(0).dtype)
        outs = [
            quire.paged_attention(
                q, self.cache.k(n), self.cache.v(n), table, np.array([length], np.int32)
            )
            for n in range(LAYERS)
        ]
        return np.stack(outs).tobytes()

    def run(self, tokens):
        seq = self.create(tokens)
        assert self.compute(seq)
        out = self.output(seq)
        self.manager.free([seq])
        self.manager.validate()
        return out


def block_bytes(dtype="float32"):
    return quire.KVCache(LAYERS, 1, SIZE, HEADS, DIM, dtype).block_bytes


def host(num_blocks, max_pending=64):
    return quire.HostStore(num_blocks * block_bytes(), block_bytes(), max_pending)


def files(path, num_blocks=100):
    return quire.FileStore(str(path), num_blocks * block_bytes(), block_bytes(), "test")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swapped_sequences_give_the_same_bits(dtype):
    engine = Engine(8, num_host_blocks=8, dtype=dtype)
    seq = engine.create(range(14))
    assert engine.compute(seq)
    before = engine.output(seq)
    assert engine.tiers.swap_out(seq) and engine.manager.is_swapped_out(seq)
    assert engine.manager.stats().swapped_blocks == 4
    other = engine.create(range(100, 130))  # all of the pool
    assert engine.compute(other)
    assert not engine.tiers.swap_in(seq)
    with pytest.raises(ValueError, match="step: seq: expected one in the pool, got one that is sw"):
        engine.manager.step([seq], [0])
    engine.manager.free([other])
    assert engine.tiers.swap_in(seq) and engine.output(seq) == before
    assert seq.num_computed_tokens == 14 and engine.manager.stats().swapped_blocks == 0
    engine.manager.validate()


def test_a_swap_without_host_blocks_is_refused():
    engine = Engine(8)
    seq = engine.create([1, 2, 3])
    with pytest.raises(ValueError, match="swap_out: expected a manager with num_host_blocks > 0"):
        engine.tiers.swap_out(seq)
    small = Engine(8, num_host_blocks=1)
    seq = small.create(range(9))
    assert small.compute(seq) and not small.tiers.swap_out(seq)
    assert seq.num_computed_tokens == 9


def test_evicted_prefixes_come_back_with_the_same_bits():
    engine = Engine(8, [host(20)])
    first = engine.run(range(26))
    engine.run(range(100, 132))  # evicts all of it
    engine.tiers.drain()
    seq = engine.create(range(26))
    assert seq.num_computed_tokens == seq.num_cached_tokens == 24
    assert engine.compute(seq) and engine.output(seq) == first
    stats = engine.manager.stats()
    assert (stats.host_hit_tokens, stats.file_hit_tokens, stats.prefix_hit_tokens) == (24, 0, 0)
    engine.manager.free([seq])
    assert engine.manager.num_used_blocks == 0


def test_blocks_of_files_move_up_to_host_memory(tmp_path):
    first = Engine(8, [files(tmp_path)])
    out = first.run(range(26))
    first.run(range(100, 132))
    first.tiers.drain()
    del first
    store = host(20)
    engine = Engine(8, [store, files(tmp_path)])
    assert engine.run(range(26)) == out
    assert engine.manager.stats().file_hit_tokens == 24
    engine.tiers.drain()
    assert store.stats()["num_blocks"] == 6


def test_a_refused_put_loses_the_copy_alone():
    engine = Engine(8, [host(1)])  # room for one block
    out = engine.run(range(26))
    engine.run(range(100, 132))
    engine.tiers.drain()
    assert engine.run(range(26)) == out
    engine.manager.validate()


def test_a_torn_file_is_computed_again(tmp_path):
    engine = Engine(8, [files(tmp_path)])
    out = engine.run(range(26))
    engine.run(range(100, 132))
    engine.tiers.drain()
    key = quire.chain_keys(np.arange(26, dtype=np.int32), SIZE)[2]
    (path,) = tmp_path.glob(f"*{bytes(key).hex()}*.kv")
    path.write_bytes(path.read_bytes()[:-5])
    seq = engine.create(range(26))
    assert seq.num_computed_tokens == 8
    assert engine.compute(seq) and engine.output(seq) == out
    engine.manager.validate()


def test_a_store_of_other_blocks_is_refused():
    store = quire.HostStore(1 << 20, 1 << 9)
    manager = quire.KVCacheManager(8, SIZE)
    cache = quire.KVCache(LAYERS, 8, SIZE, HEADS, DIM, "float32")
    with pytest.raises(ValueError, match="KVTiers: stores: expected block_bytes"):
        quire.KVTiers(manager, cache, [store])
    manager.attach_store(store)
    with pytest.raises(ValueError, match="attach_store: store: expected one store a tier"):
        manager.attach_store(quire.HostStore(1 << 20, 1 << 9))
    with pytest.raises(ValueError, match="with prefix caching"):
        quire.KVCacheManager(8, SIZE, False).attach_store(store)


def test_a_cache_of_other_blocks_or_two_stores_of_a_tier_are_refused():
    manager = quire.KVCacheManager(num_blocks=8, block_size=4)
    cache = quire.KVCache(1, 8, 4, 1, 8, "float32")
    for other, shape in (
        (quire.KVCache(1, 7, 4, 1, 8, "float32"), "7 of 4"),
        (quire.KVCache(1, 8, 8, 1, 8, "float32"), "8 of 8"),
    ):
        with pytest.raises(ValueError, match=f"cache: expected 8 blocks or more .* got {shape}"):
            quire.KVTiers(manager, other)
    stores = [quire.HostStore(1 << 16, cache.block_bytes) for _ in "ab"]
    with pytest.raises(ValueError, match="stores: expected one a tier, got two of the same"):
        quire.KVTiers(manager, cache, stores)
    quire.KVTiers(manager, cache, stores[:1])  # nothing was attached before


CHILD = """
    import itertools, sys
    sys.path.insert(0, {folder!r})
    from test_kv_tiers import Engine, files
    engine = Engine(8, [files({path!r}, 4000)])
    for n in itertools.count():
        engine.run(range(1000 * n, 1000 * n + 26))
        print(n, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("after", [12, 40])
def test_a_killed_process_leaves_a_store_that_hits(tmp_path, after):
    code = CHILD.format(folder=str(Path(__file__).parent), path=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for num_runs in map(int, child.stdout):
            last = num_runs
            if len(list(tmp_path.glob("*.kv"))) >= after:
                os.kill(child.pid, signal.SIGKILL)  # puts are under way
                break
    store = files(tmp_path, 4000)
    engine = Engine(8, [store])
    for n in range(min(last, 12) + 1):
        prompt = range(1000 * n, 1000 * n + 26)
        assert engine.run(prompt) == Engine(8).run(prompt)
    engine.tiers.drain()
    stats = store.stats()
    assert engine.manager.stats().file_hit_tokens > 0
    assert stats["dropped"] == stats["failed"] == 0
    engine.manager.validate()


def test_a_manager_goes_on_after_a_restart(tmp_path):
    engine = Engine(8, [files(tmp_path)], num_host_blocks=4)
    seq, waiting = engine.create(range(10)), engine.create(range(50, 55))
    assert engine.compute(seq, waiting, sampled=np.array([77, 78], np.int32))
    before = engine.output(seq)
    data = engine.cache.k(0).copy(), engine.cache.k(1).copy()
    saved = engine.manager.snapshot()
    manager = quire.KVCacheManager.restore(saved)
    assert manager.snapshot() == saved
    twins = {twin.id: twin for twin in manager.sequences()}
    assert set(twins) == {seq.id, waiting.id}
    other = Engine(8, num_host_blocks=4, manager=manager)
    for layer in range(LAYERS):  # memory that outlived the manager
        assert np.array_equal(engine.cache.k(layer), data[layer])
        other.cache.k(layer)[...] = engine.cache.k(layer)
        other.cache.v(layer)[...] = engine.cache.v(layer)
    assert other.output(twins[seq.id]) == before
    for each, sequence in ((engine, seq), (other, twins[seq.id])):
        assert each.compute(sequence)
        assert sequence.token_ids.tolist() == [*range(10), 77]
    assert np.array_equal(seq.block_table, twins[seq.id].block_table)
    assert engine.output(seq) == other.output(twins[seq.id])
    manager.free(manager.sequences())
    manager.validate()
    for broken in ("", "{}", saved[: len(saved) // 2]):
        with pytest.raises(ValueError, match="restore: snapshot"):
            quire.KVCacheManager.restore(broken)


def test_events_tell_what_is_cached():
    manager = quire.KVCacheManager(2, SIZE, event_capacity=100)
    engine = Engine(2, manager=manager)
    prompt = np.arange(6, dtype=np.int32)
    engine.run(prompt)
    whole, part = manager.take_events()
    assert whole.key == bytes(quire.chain_keys(prompt, SIZE)[0])
    assert (whole.kind, whole.tier, whole.sequence) == ("stored", "device", 1)
    assert part.parent == whole.key and part.block != whole.block
    engine.run([9, 9, 9, 9, 9])
    assert [e.kind for e in manager.take_events()] == ["evicted", "evicted", "stored", "stored"]
    assert manager.take_events() == []
    assert quire.KVCacheManager(2, SIZE).take_events() == []


def test_events_that_nobody_takes_leave_a_gap():
    engine = Engine(8, manager=quire.KVCacheManager(8, SIZE, event_capacity=2))
    engine.run(range(16))
    assert [event.sequence for event in engine.manager.take_events()] == [3, 4]
    assert engine.manager.stats().lost_events == 2


def test_policies_by_name():
    for eviction in ("lru", "reuse_lru"):
        manager = quire.KVCacheManager(8, SIZE, eviction=eviction)
        engine = Engine(8, manager=manager)
        for _ in range(4):
            engine.run(range(8))
        for n in range(8):
            engine.run([100 + n, 1, 2, 3])
        hit = manager.match(np.arange(8, dtype=np.int32))
        assert (hit > 0) == (eviction == "reuse_lru")
    with pytest.raises(ValueError, match='eviction: expected "lru" or "reuse_lru", got "fifo"'):
        quire.KVCacheManager(8, SIZE, eviction="fifo")


def test_stats_have_names():
    stats = quire.KVCacheManager(8, SIZE).stats()
    assert isinstance(stats, quire.KVCacheStats)
    assert stats.free_blocks == stats["free_blocks"] == 8
    assert "quire_kv_lost_events_total 0\n" in stats.prometheus()
    with pytest.raises(AttributeError):
        stats.free_blocks = 3


def test_out_of_memory_is_an_error_and_the_next_manager_works():
    """A manager and a store that do not fit are refused; nothing is left behind."""
    program = """
import resource, quire
limit = 3 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for _ in range(3):
    for make in (
        lambda: quire.KVCacheManager(1 << 27, 16),
        lambda: quire.KVCacheManager(1 << 10, 16, event_capacity=1 << 30),
        lambda: quire.HostStore(1 << 40, 1 << 20),
    ):
        try:
            make()
        except MemoryError:
            continue
        raise SystemExit("expected MemoryError")
manager = quire.KVCacheManager(1 << 16, 16)
seq = manager.create(list(range(100)))
assert manager.step([seq], [100]) is not None
manager.validate()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
