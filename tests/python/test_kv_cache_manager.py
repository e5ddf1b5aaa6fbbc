# SPDX-License-Identifier: Apache-2.0
"""KVCacheManager from Python: the views of a step, their lifetime, arguments and errors."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import quire


def tokens(n: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int32)


@pytest.fixture
def manager() -> quire.KVCacheManager:
    return quire.KVCacheManager(num_blocks=16, block_size=4)


def compute(manager: quire.KVCacheManager, seq: quire.Sequence, sampled=None) -> quire.StepBatch:
    batch = manager.step([seq], [seq.num_tokens - seq.num_computed_tokens])
    manager.commit([seq], sampled)
    return batch


def test_arrays_of_a_step(manager):
    a, b = manager.create(tokens(6)), manager.create(tokens(3, 50))
    batch = manager.step([a, b], np.array([6, 2], np.int32))
    assert batch.ticket == 1
    assert batch.block_table.dtype == np.int32 and batch.block_table.shape == (2, 2)
    assert batch.block_table[0].tolist() == [0, 1] and batch.block_table[1, 0] == 2
    assert batch.slot_mapping.dtype == np.int64
    assert batch.slot_mapping.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    assert batch.seq_lens.tolist() == [6, 2]
    assert batch.cu_seqlens_q.tolist() == [0, 6, 8]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert batch.copies.shape == (0, 2)
    for name in ("seq_lens", "cu_seqlens_q", "positions", "copies"):
        assert getattr(batch, name).dtype == np.int32


def test_a_decode_loop_reads_the_same_objects_updated_in_place(manager):
    seq = manager.create(tokens(1))
    batch = compute(manager, seq, [5])
    first = batch.seq_lens, batch.block_table, batch.slot_mapping
    batch = compute(manager, seq, [6])
    assert (batch.seq_lens, batch.block_table, batch.slot_mapping) == first
    assert batch.seq_lens is first[0] and batch.seq_lens[0] == 2


def test_views_keep_their_memory(manager):
    seq = manager.create(tokens(4))
    batch = compute(manager, seq)
    table, lengths = batch.block_table, batch.seq_lens
    many = [manager.create(tokens(4, 100 * i)) for i in range(1, 10)]
    manager.step(many, [4] * len(many))  # needs more rows: new memory
    del manager, seq, many, batch
    gc.collect()
    assert table.tolist() == [[0]] and lengths.tolist() == [4]


def test_a_batch_ends_with_the_next_step(manager):
    seq = manager.create(tokens(4))
    old = compute(manager, seq, [4])
    new = compute(manager, seq)
    assert new.seq_lens.tolist() == [5]
    with pytest.raises(ValueError, match="expected the batch of the latest step, 2, got that of"):
        _ = old.seq_lens


def test_views_go_through_dlpack(manager):
    torch = pytest.importorskip("torch")
    seq = manager.create(tokens(4))
    batch = compute(manager, seq)
    lengths = torch.from_dlpack(batch.seq_lens)
    assert lengths.tolist() == [4] and lengths.data_ptr() == batch.seq_lens.ctypes.data


def test_prefix_hits_and_match(manager):
    compute(manager, manager.create(tokens(10)))
    assert manager.match(tokens(10)) == 8
    assert manager.match(tokens(8)) == 7  # the last token is left to compute
    assert manager.match(np.array([0, 1, 2, 3, 4, 5, 99, 7], np.int32)) == 6  # inside a block
    assert manager.match(tokens(10), salt="x") == 0
    seq = manager.create(tokens(9))
    assert (seq.num_tokens, seq.num_cached_tokens, seq.num_computed_tokens) == (9, 8, 8)
    assert seq.block_table.tolist() == [0, 1]
    stats = manager.stats()
    assert stats.prefix_query_tokens == 19 and stats.prefix_hit_tokens == 8


def test_out_of_blocks_is_none_and_changes_nothing(manager):
    seq = manager.create(tokens(65))
    before = manager.stats()
    assert manager.step([seq], [65]) is None
    assert manager.stats() == before
    assert manager.step([seq], [64]) is not None


def test_counts_add_up(manager):
    a = manager.create(tokens(10))
    compute(manager, a)
    assert (manager.num_used_blocks, manager.num_used_tokens) == (3, 10)
    assert manager.stats().waste_tokens == 2
    manager.free([a])
    assert (manager.num_free_blocks, manager.num_used_blocks) == (13, 0)
    assert manager.num_cached_blocks == 3  # the partial one too
    assert manager.num_used_tokens == 0 and manager.num_blocks == 16 and manager.block_size == 4
    assert manager.stats().high_water_blocks == 3


def test_fork_copies_on_the_first_write_of_either_side(manager):
    parent = manager.create(tokens(6))
    compute(manager, parent)
    child = manager.fork(parent)
    assert child.block_table.tolist() == parent.block_table.tolist()
    manager.commit([parent, child], [[60], [61]])
    batch = manager.step([parent, child], [1, 1])
    assert batch.copies.tolist() == [[1, 2]]
    assert parent.block_table.tolist() == [0, 2] and child.block_table.tolist() == [0, 1]


def test_commit_takes_one_token_each_or_any_number(manager):
    a, b = manager.create(tokens(2)), manager.create(tokens(2, 9))
    manager.step([a, b], [2, 2])
    manager.commit([a, b], np.array([5, 6], np.int32))
    manager.commit([a, b], [np.array([7, 8], np.int32), []])
    assert a.token_ids.tolist() == [0, 1, 5, 7, 8] and b.token_ids.tolist() == [9, 10, 6]
    with pytest.raises(
        ValueError, match="commit: sampled: expected 2 tokens, one a sequence, got 1"
    ):
        manager.commit([a, b], [1])
    with pytest.raises(ValueError, match="expected tokens of 2 sequences, got of 1"):
        manager.commit([a, b], [[1]])


def test_speculative_decoding(manager):
    seq = manager.create(tokens(3))
    compute(manager, seq, [[3, 40, 50]])  # a token and two drafts
    manager.step([seq], [3])
    manager.truncate(seq, 5)  # one draft was right
    manager.commit([seq], [41])
    assert seq.token_ids.tolist() == [0, 1, 2, 3, 40, 41] and seq.num_computed_tokens == 5


def test_steps_in_flight():
    manager = quire.KVCacheManager(2, 4, async_depth=1)
    seq = manager.create(tokens(8))
    batch = manager.step([seq], [8])
    manager.free([seq])
    assert manager.num_used_blocks == 2 and manager.stats().deferred_refs == 2
    manager.retire(batch.ticket)
    assert manager.num_used_blocks == 0
    with pytest.raises(ValueError, match="retire: ticket"):
        manager.retire(batch.ticket)


def test_handles_are_safe(manager):
    other = quire.KVCacheManager(16, 4)
    seq, foreign = manager.create(tokens(3)), other.create(tokens(3))
    manager.free([seq])
    again = manager.create(tokens(3))  # in the place of the freed one
    for bad in (seq, foreign):
        for call in (
            lambda bad=bad: manager.free([bad]),
            lambda bad=bad: manager.step([bad], [1]),
            lambda bad=bad: manager.commit([bad]),
            lambda bad=bad: manager.fork(bad),
            lambda bad=bad: manager.truncate(bad, 1),
        ):
            with pytest.raises(ValueError, match="expected a live sequence of this manager"):
                call()
    with pytest.raises(ValueError, match="expected a live sequence"):
        _ = seq.num_tokens
    with pytest.raises(TypeError, match=r"step: seqs\[1\]: expected a Sequence, got int"):
        manager.step([again, 3], [1, 1])
    assert again.num_tokens == 3
    manager.validate()


def test_wrong_arrays_are_refused(manager):
    with pytest.raises(ValueError, match="create: token_ids: .*int32.*got .*int64"):
        manager.create(np.arange(3))
    with pytest.raises(ValueError, match="create: token_ids"):
        manager.create(np.zeros((2, 2), np.int32))
    with pytest.raises(TypeError, match="create: token_ids"):
        manager.create("abc")
    with pytest.raises(ValueError, match="create: token_ids: expected 1 token or more, got none"):
        manager.create([])
    with pytest.raises(ValueError, match="num_blocks"):
        quire.KVCacheManager(0, 16)


def test_a_sequence_keeps_its_manager_alive():
    seq = quire.KVCacheManager(4, 4).create(tokens(3))
    gc.collect()
    assert seq.num_tokens == 3
