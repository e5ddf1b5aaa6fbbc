# SPDX-License-Identifier: Apache-2.0
"""What the tests of other KV cache managers ask for, asked of this one; see test_vllm_scenarios.py.

Named after the suites they come from: TensorRT-LLM's kvCacheManagerTest, SGLang's radix cache,
TokenSpeed, the paged KV cache of TVM and MLC. Block ids are quire's own.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import quire
from peer_scenarios import SIZE, blocks, evict, finish, start, text, tokens


@pytest.fixture
def manager() -> quire.KVCacheManager:
    return quire.KVCacheManager(10, SIZE)


# ---- TensorRT-LLM: kvCacheManagerTest


def cache_four(manager: quire.KVCacheManager, options: list[dict]) -> list[np.ndarray]:
    """Four texts of two blocks, each with its own retention, given up in order."""
    texts = [tokens(32, 100 * i) for i in range(len(options))]
    seqs = [start(manager, t, **o) for t, o in zip(texts, options, strict=True)]
    for seq in seqs:
        finish(manager, seq)
    return texts


def test_trtllm_lower_priorities_are_evicted_first(manager):
    texts = cache_four(manager, [{"priority": p} for p in (90, 10, 35, 20)])
    for count, survivors in ((2, [0, 2, 3]), (2, [0, 2]), (2, [0])):
        evict(manager, count)
        found = [i for i, t in enumerate(texts) if manager.match(np.append(t, np.int32(0))) == 32]
        assert found == survivors
        for i, t in enumerate(texts):
            if i not in survivors:
                assert manager.match(np.append(t, np.int32(0))) == 0
        start(manager, np.full(SIZE * manager.num_free_blocks, 5000 + count, np.int32))


def test_trtllm_an_expired_high_priority_is_outlived_by_a_lower_one(manager):
    short, long = cache_four(manager, [{"priority": 80, "ttl": 0.01}, {"priority": 50}])
    time.sleep(0.02)
    evict(manager, 2)
    assert manager.match(np.append(short, np.int32(0))) == 0
    assert manager.match(np.append(long, np.int32(0))) == 32


def test_trtllm_a_priority_holds_until_it_expires(manager):
    high, low = cache_four(manager, [{"priority": 80, "ttl": 60.0}, {"priority": 50}])
    evict(manager, 2)
    assert manager.match(np.append(high, np.int32(0))) == 32
    assert manager.match(np.append(low, np.int32(0))) == 0


def test_trtllm_an_expired_block_that_is_used_again_counts_anew(manager):
    short, other = cache_four(manager, [{"priority": 80, "ttl": 0.01}, {"priority": 50}])
    time.sleep(0.02)
    finish(manager, start(manager, np.append(short, np.int32(0)), priority=60))
    evict(manager, 1)  # the partial block of that sequence's last token goes first or stays
    evict(manager, 2)
    assert manager.match(np.append(short, np.int32(1))) == 32
    assert manager.match(np.append(other, np.int32(1))) < 32


def test_trtllm_an_expired_parent_goes_after_its_children(manager):
    parent = start(manager, tokens(16), priority=80, ttl=0.0)
    child = start(manager, tokens(48), priority=90)
    finish(manager, child)
    finish(manager, parent)
    evict(manager, 1)
    assert manager.match(tokens(48)) in (32, 47)  # a leaf is gone, never a parent alone
    evict(manager, 2)
    assert manager.match(tokens(48)) in (0, 15, 16, 32)


def test_trtllm_pinned_blocks_stay(manager):
    (system,) = cache_four(manager, [{}])
    assert manager.pin(system) == 32 and manager.pin(system) == 32
    assert manager.stats().pinned_blocks == 2
    evict(manager, 0)
    seq = manager.create(np.array([9], np.int32))
    assert manager.step([seq], [1], lookahead=8 * SIZE) is None
    assert manager.step([seq], [1], lookahead=8 * SIZE - 1) is not None
    assert manager.match(np.append(system, np.int32(0))) == 32
    manager.free([seq])
    assert manager.unpin(system) == manager.unpin(system) == 32 and manager.unpin(system) == 0
    assert manager.num_used_blocks == 0 and manager.stats().pinned_blocks == 0
    evict(manager, 2)
    assert manager.match(system) == 0


def test_trtllm_pinning_a_sequence_keeps_what_it_computed(manager):
    seq = start(manager, tokens(40))
    assert manager.pin(seq) == 32
    finish(manager, seq)
    assert manager.stats().pinned_blocks == 2 and manager.num_used_tokens == 32
    assert manager.unpin(tokens(40)) == 32
    assert manager.num_used_blocks == 0


def test_trtllm_statistics_per_request(manager):
    for _ in range(3):
        finish(manager, start(manager, tokens(31)))
    stats = manager.stats()
    assert stats.prefix_query_tokens == 93 and stats.prefix_hit_tokens == 60


def test_trtllm_partial_reuse_gives_all_but_the_last_token(manager):
    finish(manager, start(manager, tokens(21)))
    assert manager.match(tokens(21)) == 20
    assert manager.match(tokens(30)) == 21
    assert manager.match(tokens(18)) == 17


def test_trtllm_rewind_gives_blocks_back(manager):
    seq = start(manager, tokens(60))
    manager.truncate(seq, 17)
    assert len(blocks(seq)) == 2 and manager.num_used_blocks == 2


def test_trtllm_beams_share_the_context_and_own_their_last_block(manager):
    seq = start(manager, tokens(40))
    beams = [seq, *manager.fork(seq, 3)]
    manager.commit(beams, [50, 51, 52, 53])
    batch = manager.step(beams, [1] * 4)
    assert len(batch.copies) == 3
    tables = [blocks(beam) for beam in beams]
    assert all(table[:2] == tables[0][:2] for table in tables)
    assert len({table[2] for table in tables}) == 4


def test_trtllm_a_shared_block_of_a_window_is_copied_before_it_is_written():
    groups = [quire.LayerGroup(), quire.LayerGroup("sliding_window", window=20)]
    manager = quire.KVCacheManager(20, SIZE, groups=groups)
    seq = start(manager, tokens(40))
    child = manager.fork(seq)
    shared = seq.block_tables[1].tolist()
    assert shared[0] == -1 and child.block_tables[1].tolist() == shared
    manager.commit([seq, child], [50, 60])
    batch = manager.step([seq, child], [1, 1])
    last = [s.block_tables[1].tolist()[2] for s in (seq, child)]
    assert batch.groups[1].copies.tolist() == [[shared[2], min(set(last) - {shared[2]})]]
    assert len(set(last)) == 2 and shared[2] in last
    manager.commit([seq, child])
    finish(manager, seq, child)
    assert manager.num_used_blocks == 0


def test_trtllm_an_evicted_block_is_offloaded_and_onboarded_when_it_is_hit(manager):
    cache = quire.KVCache(1, 10, SIZE, 1, 4, "float32")
    tiers = quire.KVTiers(manager, cache, [quire.HostStore(1 << 20, cache.block_bytes)])
    first = start(manager, tokens(48))
    cache.k(0)[blocks(first)] = 7.0
    finish(manager, first)
    other = manager.create(tokens(160, 500))
    assert manager.step([other], [160]) is not None
    assert tiers.offload() == 3
    tiers.drain()
    manager.commit([other])
    finish(manager, other)
    again = manager.create(tokens(49))
    assert again.num_cached_tokens == 0 and tiers.fetch(again) == 48
    assert again.num_cached_tokens == 48 and (cache.k(0)[blocks(again)] == 7.0).all()


# ---- SGLang: radix cache


def test_sglang_insert_1_2_3_match_1_2_4():
    manager = quire.KVCacheManager(8, SIZE)
    finish(manager, start(manager, [1, 2, 3]))
    assert manager.match([1, 2, 4, 5]) == 2


def test_sglang_siblings_split_where_they_differ(manager):
    for end in range(5):
        finish(manager, start(manager, text(20, end, 8)))
    for end in range(5):
        assert manager.match(text(20, end, 8)) == 27
        assert manager.match(np.append(text(20, end, 3), np.int32(0))) == 23
    assert manager.match(text(20, 77, 8)) == 20


def test_sglang_a_locked_prefix_is_not_evicted(manager):
    seq = start(manager, tokens(64))
    finish(manager, start(manager, tokens(64, 500)))
    evict(manager, 4)
    assert manager.match(tokens(65)) == 64 and manager.match(tokens(65, 500)) == 0
    finish(manager, seq)


def test_sglang_free_and_evictable_and_protected_make_the_pool(manager):
    seqs = []
    for i in range(6):
        seqs.append(start(manager, text(16, i, 10)))
        if i % 2:
            finish(manager, seqs.pop(0))
        stats = manager.stats()
        assert stats.free_blocks + stats.used_blocks + stats.cached_blocks == 10


@pytest.mark.parametrize("count", range(1, 10))
def test_sglang_an_eviction_frees_as_many_as_it_needs_and_leaves_first(manager, count):
    for end in range(5):  # a common block, and five of the children's own
        finish(manager, start(manager, text(16, end, 16 if end else 48)))
    cached = manager.num_cached_blocks
    assert cached == 8 and manager.num_free_blocks == 2
    evict(manager, min(count, cached))
    assert manager.stats().evicted_blocks == min(count, cached)
    assert (manager.match(tokens(17)) == 0) == (count >= cached)  # the root goes last of all


def test_sglang_a_reset_zeroes_all_sizes(manager):
    for first in (0, 100, 200):
        finish(manager, start(manager, tokens(40, first)))
    assert manager.num_cached_blocks == 9
    assert manager.clear_cache() == 9
    stats = manager.stats()
    assert (stats.free_blocks, stats.used_blocks, stats.cached_blocks) == (10, 0, 0)


def test_sglang_a_split_keeps_locks(manager):
    seq = start(manager, tokens(48))
    finish(manager, start(manager, text(40, 1, 30)))  # leaves the path of `seq` in its third block
    evict(manager, manager.num_cached_blocks)
    assert manager.match(tokens(49)) == 48 and blocks(seq) == sorted(blocks(seq))
    finish(manager, seq)


# ---- TokenSpeed and Dynamo: admission


def test_tokenspeed_failed_admission_changes_nothing_in_any_group():
    groups = [quire.LayerGroup(), quire.LayerGroup("sliding_window", window=20)]
    manager = quire.KVCacheManager(12, SIZE, groups=[*groups, quire.LayerGroup("state")])
    finish(manager, start(manager, tokens(48)))
    holder = start(manager, tokens(16, 500))
    seq = manager.create(tokens(200, 900))
    before, groups_before = manager.stats(), manager.group_stats()
    assert manager.step([holder, seq], [0, 200]) is None
    assert manager.stats() == before and manager.group_stats() == groups_before
    manager.validate()


def test_tokenspeed_a_rejected_hit_does_not_refresh_recency(manager):
    finish(manager, start(manager, tokens(32)))
    finish(manager, start(manager, tokens(32, 500)))
    assert manager.match(tokens(32)) == 31  # asked, and not taken
    finish(manager, start(manager, tokens(8 * SIZE, 900)))
    assert manager.match(tokens(32)) == 0 and manager.match(tokens(32, 500)) == 31


def test_tokenspeed_an_abort_in_mid_prefill_restores_the_baseline(manager):
    scheduler = quire.Scheduler(manager, max_tokens_per_step=20)
    request = scheduler.add(tokens(90), 4)
    assert scheduler.schedule() is not None
    scheduler.commit(np.zeros(0, np.int32))
    scheduler.finish(request)
    assert manager.num_used_blocks == 0 and not scheduler.has_work
    manager.validate()


def test_tokenspeed_what_was_reserved_and_not_used_is_refunded(manager):
    seq = manager.create(tokens(20))
    assert manager.step([seq], [20], lookahead=60) is not None
    assert manager.num_used_blocks == 5
    manager.commit([seq], [20])
    manager.truncate(seq, 20)
    assert manager.num_used_blocks == 2
    finish(manager, seq)
    assert manager.num_used_blocks == 0


# ---- MLC and TVM: fork and rollback


@pytest.mark.parametrize("offset", range(1, 41))
def test_mlc_fork_at_every_offset_then_both_sides_grow(offset):
    manager = quire.KVCacheManager(32, SIZE)
    kv = np.full(32 * SIZE, -1, np.int64)

    def decode(seqs, sampled):
        manager.commit(seqs, sampled)
        batch = manager.step(seqs, [1] * len(seqs))
        rows = kv.reshape(-1, SIZE)
        rows[batch.copies[:, 1]] = rows[batch.copies[:, 0]]
        kv[batch.slot_mapping] = sampled

    parent = manager.create(tokens(40))
    kv[manager.step([parent], [40]).slot_mapping] = tokens(40)
    manager.commit([parent])
    child = manager.fork(parent)
    manager.truncate(child, offset)
    for turn in range(20):
        decode([parent, child], np.array([100 + turn, 200 + turn], np.int32))
    manager.commit([parent, child])
    for seq, known in (
        (parent, [*range(40), *range(100, 120)]),
        (child, [*range(offset), *range(200, 220)]),
    ):
        assert seq.token_ids.tolist() == known
        assert kv.reshape(-1, SIZE)[seq.block_table].reshape(-1)[: len(known)].tolist() == known
    manager.validate()


def test_mlc_diverging_children_match_the_deepest_first():
    manager = quire.KVCacheManager(32, SIZE)
    seq = start(manager, tokens(20))
    child = manager.fork(seq)
    manager.commit([seq, child], [[50, 51, 52], [50, 61]])
    manager.step([seq, child], [3, 2])
    manager.commit([seq, child])
    finish(manager, seq, child)
    assert manager.match([*range(20), 50, 51, 52, 0]) == 23
    assert manager.match([*range(20), 50, 61, 0]) == 22
    assert manager.match([*range(20), 50, 9, 0]) == 21


def test_mlc_rollback_by_any_length_gives_capacity_back():
    for length in range(1, 49):
        manager = quire.KVCacheManager(8, SIZE)
        seq = start(manager, tokens(48))
        other = manager.fork(seq)
        manager.truncate(seq, length)
        assert len(blocks(seq)) == -(-length // SIZE)
        finish(manager, seq, other)
        assert manager.num_used_blocks == 0


def test_mlc_capacity_is_as_before_when_all_are_removed():
    manager = quire.KVCacheManager(32, SIZE, prefix_caching=False)
    seq = start(manager, tokens(40))
    children = manager.fork(seq, 5)
    grandchildren = manager.fork(children[2], 5)
    finish(manager, children[0], seq, *grandchildren[:2])
    finish(manager, *children[1:], *grandchildren[2:])
    assert manager.num_free_blocks == 32


# ---- Lookahead: room for drafts


def test_lookahead_reaches_beyond_known_tokens(manager):
    seq = start(manager, tokens(14))
    manager.commit([seq], [14])
    batch = manager.step([seq], [1], lookahead=4)
    assert batch.seq_lens.tolist() == [15] and len(batch.slot_mapping) == 1
    assert batch.block_table.shape == (1, 2) and len(blocks(seq)) == 2
    manager.commit([seq], [[15, 16, 17]])
    assert manager.step([seq], [3]) is not None and len(blocks(seq)) == 2
    with pytest.raises(ValueError, match="lookahead: expected 0 or more, got -1"):
        manager.step([seq], [1], lookahead=-1)


def test_mlc_a_rollback_into_a_shared_block_is_a_fork():
    manager = quire.KVCacheManager(8, SIZE)
    seq = start(manager, tokens(40))
    child = manager.fork(seq)
    manager.truncate(child, 20)
    manager.commit([child], [99])
    batch = manager.step([child], [1])
    assert batch.copies.tolist() == [[blocks(seq)[1], blocks(child)[1]]]
    assert seq.token_ids.tolist() == list(range(40)) and blocks(seq)[1] != blocks(child)[1]
    manager.commit([child])
    finish(manager, seq, child)
