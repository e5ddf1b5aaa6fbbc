# SPDX-License-Identifier: Apache-2.0
"""A manager recorded from Python is replayed by the core, result by result."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import quire


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
    with pytest.raises(ValueError, match="replay: log: expected a call log of version 2"):
        quire.replay_calls(str(tmp_path / "empty"))
    with pytest.raises(OSError, match="nowhere"):
        quire.replay_calls(str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="folder"):
        quire.RecordedKVCacheManager(str(tmp_path / "folder" / "x"), 4, 4)
