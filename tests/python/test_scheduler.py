# SPDX-License-Identifier: Apache-2.0
"""Scheduler from Python: its batches, their order, early ends and errors."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import quire


def tokens(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int32)


def scheduler_of(num_blocks: int = 64, block_size: int = 4, **config) -> quire.Scheduler:
    return quire.Scheduler(quire.KVCacheManager(num_blocks, block_size), **config)


def test_fields_of_a_batch():
    scheduler = scheduler_of(max_tokens_per_step=10)
    assert [scheduler.add(tokens(6), 2), scheduler.add(tokens(8, 50), 2)] == [0, 1]
    batch = scheduler.schedule()
    assert batch.request_ids.tolist() == [0, 1]
    assert batch.num_new_tokens.tolist() == [6, 4]
    assert batch.token_ids.tolist() == [0, 1, 2, 3, 4, 5, 50, 51, 52, 53]
    assert batch.sampling.tolist() == [0] and batch.num_preempted == 0
    assert batch.seq_lens.tolist() == [6, 4] and batch.cu_seqlens_q.tolist() == [0, 6, 10]
    assert batch.block_table.shape == (2, 2) and len(batch.copies) == 0
    for name in ("request_ids", "num_new_tokens", "token_ids", "sampling"):
        assert getattr(batch, name).dtype == np.int32
    assert isinstance(batch, quire._core.StepBatch)


def test_until_nothing_is_left():
    scheduler = scheduler_of(max_seqs=2)
    for i in range(5):
        scheduler.add(tokens(5, 100 * i), 3)
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 5)
    finished = []
    while (batch := scheduler.schedule()) is not None:
        finished += scheduler.commit(np.zeros(len(batch.sampling), np.int32))
        scheduler.validate()
    assert finished == [0, 1, 2, 3, 4]
    assert not scheduler.has_work and scheduler.schedule() is None


def test_preemption_shows_and_costs_nothing_but_time():
    manager = quire.KVCacheManager(6, 4, prefix_caching=False)
    scheduler = quire.Scheduler(manager, watermark=0.0)
    for i in range(2):
        scheduler.add(tokens(8, 100 * i), 12)
    generated = [0, 0]
    preempted = 0
    while (batch := scheduler.schedule()) is not None:
        preempted += batch.num_preempted
        for row in batch.sampling:
            generated[batch.request_ids[row]] += 1
        scheduler.commit(np.zeros(len(batch.sampling), np.int32))
    assert preempted == scheduler.num_preemptions > 0
    assert generated == [12, 12] and manager.num_used_blocks == 0


def test_one_huge_block_a_sequence():
    manager = quire.KVCacheManager(2, 10**6, prefix_caching=False)
    scheduler = quire.Scheduler(manager)
    for i in range(3):
        scheduler.add(tokens(10, i), 5)
    scheduler.schedule()
    assert manager.num_used_blocks == 2 and scheduler.num_waiting == 1


def test_finish_in_any_state():
    scheduler = scheduler_of(max_seqs=1)
    for i in range(3):
        scheduler.add(tokens(5, 100 * i), 3)
    batch = scheduler.schedule()
    scheduler.finish(0)
    scheduler.finish(2)
    assert scheduler.commit(np.zeros(len(batch.sampling), np.int32)) == []
    assert scheduler.schedule().request_ids.tolist() == [1]
    scheduler.finish(0)
    with pytest.raises(ValueError, match="finish: request_id: .*got 3"):
        scheduler.finish(3)


def test_a_batch_ends_with_the_next_step():
    scheduler = scheduler_of()
    scheduler.add(tokens(5), 3)
    old = scheduler.schedule()
    scheduler.commit([1])
    scheduler.schedule()
    with pytest.raises(ValueError, match="latest step"):
        _ = old.token_ids


def test_priorities_tenants_and_what_explain_says():
    scheduler = scheduler_of(max_seqs=1, prefix_window=2, max_overtakes=10)
    for i, (priority, tenant) in enumerate([(0, "a"), (0, "a"), (0, "b"), (1, "a")]):
        scheduler.add(tokens(5, 100 * i), 2, priority=priority, tenant=tenant)
    finished = []
    while (batch := scheduler.schedule()) is not None:
        if not finished:
            assert "max_seqs run" in scheduler.explain()
        finished += scheduler.commit(np.zeros(len(batch.sampling), np.int32))
    assert finished == [3, 2, 0, 1]  # the priority, then the tenant that was served less
    assert scheduler.explain().endswith("no request waits\n")


def test_wrong_arguments():
    scheduler = scheduler_of(4, 4)
    with pytest.raises(ValueError, match="add: token_ids: .* fit 4 blocks of 4, got 14 \\+ 3"):
        scheduler.add(tokens(14), 3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        scheduler.add(tokens(4), 0)
    with pytest.raises(ValueError, match="commit: expected a schedule"):
        scheduler.commit([])
    scheduler.add(tokens(4), 3)
    scheduler.schedule()
    with pytest.raises(ValueError, match="schedule: expected commit"):
        scheduler.schedule()
    with pytest.raises(ValueError, match="commit: sampled: expected one token a sampling row, 1"):
        scheduler.commit([1, 2])
    for config in (
        {"max_tokens_per_step": 0},
        {"max_seqs": 0},
        {"watermark": 1.5},
        {"prefix_window": 0},
        {"max_overtakes": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(config))):
            scheduler_of(**config)


def test_scheduler_and_batch_keep_what_they_need_alive():
    scheduler = scheduler_of()
    scheduler.add(tokens(5), 3)
    batch = scheduler.schedule()
    del scheduler
    gc.collect()
    assert batch.token_ids.tolist() == [0, 1, 2, 3, 4] and batch.seq_lens.tolist() == [5]


def test_ends_well_though_its_sequences_were_freed_by_others():
    manager = quire.KVCacheManager(num_blocks=32, block_size=4)
    scheduler = quire.Scheduler(manager)
    for prompt in ([1, 2, 3, 4, 5], [6, 7]):
        scheduler.add(prompt, max_new_tokens=3)
    scheduler.schedule()
    manager.free(manager.sequences()[:1])
    with pytest.raises(ValueError, match="expected a live sequence of this manager"):
        scheduler.commit(np.array([1, 1], np.int32))
    del scheduler
    assert manager.num_used_blocks == 0 and not manager.sequences()
    manager.validate()
