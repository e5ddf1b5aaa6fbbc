# SPDX-License-Identifier: Apache-2.0
"""Layer groups from Python: arguments, arrays, and what the suites of other engines ask of them."""

from __future__ import annotations

import numpy as np
import pytest
import quire

FULL = quire.LayerGroup()
STATE = quire.LayerGroup("state")


def window(size: int) -> quire.LayerGroup:
    return quire.LayerGroup("sliding_window", window=size)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def run(manager: quire.KVCacheManager, seq: quire.Sequence, count: int) -> quire.StepBatch:
    batch = manager.step([seq], [count])
    assert batch is not None
    ends = seq.num_computed_tokens + count == seq.num_tokens
    manager.commit([seq], ints(9) if ends else None)
    manager.validate()
    return batch


def held(seq: quire.Sequence) -> list[int]:
    return [int((table >= 0).sum()) for table in seq.block_tables]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "ring"}, "kind: expected full, sliding_window, chunked_local or state, got ring"),
        ({"kind": "sliding_window"}, "window: expected a number of tokens for kind sliding_window"),
        ({"kind": "sliding_window", "window": 0}, "window: expected 1 token or more, got 0"),
        ({"kind": "chunked_local", "window": 4}, "window: expected none for kind chunked_local"),
        ({"kind": "full", "chunk": 4}, "chunk: expected none for kind full, got 4"),
    ],
)
def test_wrong_groups_are_refused_by_name(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        quire.LayerGroup(**arguments)


def test_a_group_says_what_it_is():
    group = quire.LayerGroup("chunked_local", chunk=8192)
    assert (group.kind, group.window, group.chunk) == ("chunked_local", None, 8192)
    assert repr(group) == "LayerGroup('chunked_local', chunk=8192)"
    assert repr(window(4)) == "LayerGroup('sliding_window', window=4)" and repr(FULL)
    manager = quire.KVCacheManager(8, 4, groups=[FULL, group, STATE])
    assert [g.kind for g in manager.groups] == ["full", "chunked_local", "state"]
    assert [g.kind for g in quire.KVCacheManager(8, 4).groups] == ["full"]


def test_the_first_group_is_full():
    with pytest.raises(ValueError, match=r"groups\[0\]: expected full attention"):
        quire.KVCacheManager(8, 4, groups=[window(4), FULL])


def test_a_step_has_arrays_for_each_group():
    manager = quire.KVCacheManager(32, 4, groups=[FULL, window(5), STATE])
    seq = manager.create(np.arange(10, dtype=np.int32))
    batch = manager.step([seq], [10])
    full, local, state = batch.groups
    assert np.array_equal(full.block_table, batch.block_table)
    assert np.array_equal(local.block_table[0], seq.block_tables[1])
    assert np.array_equal(local.positions, batch.positions)
    assert not set(local.slot_mapping.tolist()) & set(full.slot_mapping.tolist())
    assert state.block_table.tolist() == [seq.block_tables[2].tolist()]
    assert len(state.slot_mapping) == 0 and state.seq_lens.tolist() == [10]
    manager.commit([seq], ints(1))
    manager.step([seq], [1])
    with pytest.raises(ValueError, match="expected the batch of the latest step"):
        local.block_table  # noqa: B018


def test_only_changed_entries_are_in_the_changes_of_a_group():
    manager = quire.KVCacheManager(64, 4, groups=[FULL, window(9)])
    seq = manager.create(np.arange(21, dtype=np.int32))
    run(manager, seq, 21)
    mirror: dict[int, int] = {}
    for _ in range(40):
        group = manager.step([seq], [1]).groups[1]
        mirror.update(group.changes.tolist())
        table = group.block_table[0].tolist()
        assert [mirror[column] for column in range(len(table))] == table
        assert len(group.changes) <= 6 or len(mirror) == len(group.changes)
        manager.commit([seq], ints(1))


def test_vllm_only_the_tail_of_a_window_need_be_cached():
    """test_prefix_caching: blocks before the window are not asked for."""
    manager = quire.KVCacheManager(100, 16, groups=[FULL, window(32)])
    prompt = np.arange(160, dtype=np.int32)
    seq = manager.create(prompt)
    run(manager, seq, 160)
    follower = manager.create(np.append(prompt, [1]).astype(np.int32))
    assert follower.num_cached_tokens == 160
    assert held(follower) == [10, 2]
    assert follower.block_tables[1][:8].tolist() == [-1] * 8


def test_vllm_freed_behind_the_window_while_it_moves():
    """test_single_type_kv_cache_manager: remove_skipped_blocks."""
    manager = quire.KVCacheManager(100, 2, prefix_caching=False, groups=[FULL, window(4)])
    seq = manager.create(np.arange(11, dtype=np.int32))
    for count, first in ((4, 0), (1, 1), (1, 1), (1, 2), (4, 4)):
        run(manager, seq, count)  # the next token, at p, reads p - 3 and what follows
        table = seq.block_tables[1].tolist()
        assert [block >= 0 for block in table] == [i >= first for i in range(len(table))]


def test_vllm_chunked_local_attention_keeps_the_chunk():
    """test_single_type_kv_cache_manager: chunked local attention."""
    chunked = quire.LayerGroup("chunked_local", chunk=4)
    manager = quire.KVCacheManager(100, 2, groups=[FULL, chunked])
    seq = manager.create(np.arange(11, dtype=np.int32))
    for count, first in ((3, 0), (1, 2), (1, 2), (2, 2), (1, 4)):
        run(manager, seq, count)
        table = seq.block_tables[1].tolist()
        assert [block >= 0 for block in table] == [i >= first for i in range(len(table))]


def test_vllm_a_hit_falls_back_to_what_all_groups_have():
    """test_prefix_caching: hybrid models, the fixed point over groups."""
    manager = quire.KVCacheManager(18, 4, groups=[FULL, window(5)])
    prompt = np.arange(32, dtype=np.int32)
    seq = manager.create(prompt)
    for _ in range(4):
        run(manager, seq, 8)
    assert manager.match(np.append(prompt, [1]).astype(np.int32)) == 32
    assert manager.match(prompt[:18]) == 16
    # Blocks that left the window are the least recently used: another prompt takes them.
    other = manager.create(np.arange(100, 116, dtype=np.int32))
    run(manager, other, 16)
    assert manager.group_stats()[1]["cached_blocks"] < 7
    assert manager.match(np.append(prompt, [1]).astype(np.int32)) == 32
    assert manager.match(prompt[:18]) == 0


def test_vllm_a_state_is_found_at_a_block_boundary_alone():
    """test_mamba: align mode."""
    manager = quire.KVCacheManager(64, 16, groups=[FULL, STATE])
    prompt = np.arange(100, dtype=np.int32)
    seq = manager.create(prompt)
    run(manager, seq, 96)
    run(manager, seq, 4)
    again = manager.create(prompt)
    assert again.num_cached_tokens == 96
    batch = manager.step([again], [4])
    source, target = batch.groups[1].copies[0]
    assert target == again.block_tables[1][0] == batch.groups[1].block_table[0, 0] != source
    unaligned = quire.KVCacheManager(64, 16, groups=[FULL, STATE])
    seq = unaligned.create(prompt)
    run(unaligned, seq, 100)
    assert unaligned.match(prompt) == 0


def test_vllm_the_cap_of_a_window_lets_a_long_prompt_in():
    """test_scheduler: admission counts a window's blocks, not the prompt's."""
    manager = quire.KVCacheManager(28, 4, groups=[FULL, window(8)])
    scheduler = quire.Scheduler(manager, max_tokens_per_step=8, watermark=0.0)
    scheduler.add(np.arange(90, dtype=np.int32), 2)  # 23 blocks, and 5 of the window's layers
    steps = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        scheduler.commit(np.full(len(batch.sampling), 3, np.int32))
        manager.validate()
        steps += 1
    assert steps == 13 and scheduler.num_preemptions == 0


def test_sglang_a_rejected_draft_costs_no_window():
    manager = quire.KVCacheManager(64, 4, prefix_caching=False, groups=[FULL, window(6)])
    seq = manager.create(np.arange(30, dtype=np.int32))
    run(manager, seq, 30)
    manager.commit([seq], [ints(5, 6, 7)])  # drafts
    manager.step([seq], [4])
    manager.truncate(seq, 32)
    manager.commit([seq], [ints(8)])
    assert (seq.num_computed_tokens, seq.num_tokens) == (32, 33)
    manager.validate()


def test_pool_is_whole_again_when_all_are_freed():
    manager = quire.KVCacheManager(64, 4, groups=[FULL, window(6), STATE, window(20)])
    seqs = [manager.create(np.arange(n, dtype=np.int32)) for n in (9, 30, 17)]
    manager.step(seqs, [seq.num_tokens - seq.num_computed_tokens for seq in seqs])
    manager.commit(seqs, ints(1, 2, 3))
    seqs += manager.fork(seqs[0], 2)
    manager.step(seqs, np.ones(5, np.int32))
    manager.commit(seqs, ints(1, 2, 3, 4, 5))
    manager.free(seqs)
    manager.validate()
    stats = manager.stats()
    assert stats["used_blocks"] == 0 and stats["free_blocks"] + stats["cached_blocks"] == 64
    assert sum(group["cached_blocks"] for group in manager.group_stats()) == stats["cached_blocks"]
