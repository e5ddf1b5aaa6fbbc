# SPDX-License-Identifier: Apache-2.0
"""One manager and one scheduler, called from many threads at once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import quire


class Background:
    """Threads that call something again and again; what they raise, the test raises."""

    def __init__(self, count: int, call: Callable[[int], None]) -> None:
        """Starts them."""
        self.call = call
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.turns = 0
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(count)]

    def run(self, index: int) -> None:
        try:
            while not self.stop.is_set():
                self.call(index)
                self.turns += 1
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> Background:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        while self.turns == 0 and not self.errors:
            time.sleep(0.001)
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


def tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, count, np.int32)


def test_readers_while_one_thread_steps():
    manager = quire.KVCacheManager(600, 4)
    prompt = tokens(1024, 1)
    kept = manager.create(prompt)
    manager.step([kept], [1024])
    manager.commit([kept])
    asked = np.append(prompt, np.int32(5))

    def read(index: int) -> None:
        assert manager.match(asked) == 1024
        stats = manager.stats()
        assert stats["free_blocks"] + stats["used_blocks"] + stats["cached_blocks"] == 600
        assert 0 <= stats["used_tokens"] <= 600 * 4
        assert 256 <= manager.num_used_blocks <= 600 and kept.num_tokens == 1024

    with Background(3, read):
        for turn in range(40):
            seqs = [manager.create(tokens(30 + i, 1000 + 100 * turn + i)) for i in range(8)]
            counts = [seq.num_tokens - seq.num_computed_tokens for seq in seqs]  # one may be cached
            batch = manager.step(seqs, counts)
            assert batch is not None and len(batch.positions) == sum(counts)
            manager.commit(seqs, np.zeros(8, np.int32))
            ones = np.ones(8, np.int32)
            for _ in range(9):
                batch = manager.step(seqs, ones)
                assert batch is not None and batch.seq_lens.shape == (8,)
                manager.commit(seqs, ones)
            manager.free(seqs)
    manager.validate()
    assert manager.stats()["used_tokens"] == 1024 and manager.stats()["evicted_blocks"] > 0


def test_threads_with_sequences_of_their_own():
    manager = quire.KVCacheManager(400, 4)
    done = []

    def run(index: int) -> None:
        seq = manager.create(tokens(70, index % 2))
        child = manager.fork(seq)
        manager.truncate(child, 30)
        assert np.array_equal(child.token_ids, tokens(70, index % 2)[:30])
        manager.free([seq, child])
        done.append(index)

    with Background(4, run):
        while len(done) < 200:
            time.sleep(0.001)
    manager.validate()
    assert manager.num_used_blocks == 0


def test_requests_come_from_other_threads():
    manager = quire.KVCacheManager(200, 4)
    scheduler = quire.Scheduler(manager, max_tokens_per_step=64, max_seqs=8)
    ids: list[list[int]] = [[], [], []]

    def client(index: int) -> None:
        if len(ids[index]) < 25:
            ids[index].append(scheduler.add(tokens(5 + len(ids[index]), index), 3))
        assert scheduler.num_running <= 8

    finished: list[int] = []
    with Background(3, client):
        while len(finished) < 75:
            batch = scheduler.schedule()
            if batch is not None:
                finished += scheduler.commit(np.zeros(len(batch.sampling), np.int32))
    assert sorted(finished) == list(range(75)) == sorted(sum(ids, []))
    scheduler.validate()


def test_a_batch_ends_with_a_step_of_another_thread():
    manager = quire.KVCacheManager(16, 4)
    seqs = [manager.create(tokens(5, i)) for i in range(2)]
    mine = manager.step(seqs[:1], [5])
    thread = threading.Thread(target=lambda: manager.step(seqs[1:], [5]))
    thread.start()
    thread.join()
    assert mine is not None
    with pytest.raises(ValueError, match="latest step"):
        _ = mine.positions


def test_arrays_of_a_batch_while_others_step():
    manager = quire.KVCacheManager(64, 4)
    seqs = [manager.create(tokens(5, i)) for i in range(2)]
    latest = [manager.step(seqs, [5, 5])]

    def look(index: int) -> None:
        batch = latest[0]
        try:
            assert batch.seq_lens.tolist() in ([5, 5], [5])
            assert len(batch.positions) in (10, 5) and batch.block_table.shape[1] == 2
        except ValueError as error:
            assert "latest step" in str(error)

    with Background(3, look):
        for turn in range(2000):
            latest[0] = manager.step(seqs[: 1 + turn % 2], [5, 5][: 1 + turn % 2])


def test_a_list_of_sequences_that_changes_while_it_is_read():
    manager = quire.KVCacheManager(64, 4)
    kept = [manager.create(tokens(5, i)) for i in range(8)]
    seqs = list(kept)

    def change(index: int) -> None:
        seqs.clear()
        seqs.extend(kept)

    with Background(1, change):
        for _ in range(2000):
            try:
                batch = manager.step(seqs, [5] * 8)
                assert batch is not None
            except (ValueError, IndexError) as error:
                assert "step: " in str(error) or "list index" in str(error)
    manager.free(kept)
    manager.validate()


def test_a_log_has_the_order_in_which_calls_of_threads_ran(tmp_path):
    path = str(tmp_path / "calls.quirelog")
    manager = quire.RecordedKVCacheManager(path, 200, 4)
    done = []

    def run(index: int) -> None:
        seq = manager.create(tokens(30, index % 2))
        child = manager.fork(seq)
        manager.truncate(child, 10)
        manager.free([child, seq])
        done.append(index)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads meet within the recorder's own code
    try:
        with Background(4, run):
            while len(done) < 200:
                time.sleep(0.001)
    finally:
        sys.setswitchinterval(interval)
    num_calls, difference = quire.replay_calls(path)
    assert difference is None and num_calls >= 800
