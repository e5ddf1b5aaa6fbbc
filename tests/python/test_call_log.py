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
    with pytest.raises(ValueError, match="replay: log: expected a call log of version 1"):
        quire.replay_calls(str(tmp_path / "empty"))
    with pytest.raises(OSError, match="nowhere"):
        quire.replay_calls(str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="folder"):
        quire.RecordedKVCacheManager(str(tmp_path / "folder" / "x"), 4, 4)
