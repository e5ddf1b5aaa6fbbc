# SPDX-License-Identifier: Apache-2.0
"""What vLLM's tests of prefix caching, queues and its scheduler ask for, asked of this manager.

Block ids are quire's own.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import quire
from peer_scenarios import SIZE, blocks, finish, start, text, tokens


@pytest.fixture
def manager() -> quire.KVCacheManager:
    return quire.KVCacheManager(10, SIZE)


# ---- vLLM: prefix caching


def test_vllm_second_request_shares_48_of_55_tokens(manager):
    first = start(manager, text(48, 1, 7))
    assert first.num_cached_tokens == 0 and len(blocks(first)) == 4
    second = start(manager, text(48, 2, 7))
    assert second.num_cached_tokens == 48
    assert blocks(second)[:3] == blocks(first)[:3] and blocks(second)[3] != blocks(first)[3]
    assert manager.num_used_blocks == 5


def test_vllm_a_freed_prefix_is_revived_before_anything_is_allocated(manager):
    first, second = start(manager, text(48, 1, 7)), start(manager, text(48, 2, 7))
    prefix = blocks(first)[:3]
    finish(manager, first)
    finish(manager, second)
    third = manager.create(text(48, 3, 7))
    assert blocks(third) == prefix and manager.num_used_blocks == 3


def test_vllm_a_miss_evicts_tails_before_heads_and_the_oldest_first(manager):
    first, second = start(manager, text(64, 1, 0)), start(manager, tokens(64, 500))
    finish(manager, first)
    finish(manager, second)
    for needed, left_of_first, left_of_second in ((3, 48, 63), (2, 16, 63), (3, 0, 32)):
        manager.free([start(manager, np.full(needed * SIZE, 7000 + left_of_first, np.int32))])
        assert manager.match(text(64, 1, 0)) == left_of_first
        assert manager.match(tokens(64, 500)) == left_of_second


def test_vllm_decode_fills_a_block_that_then_hits(manager):
    seq = start(manager, tokens(63))
    manager.commit([seq], [63])
    assert manager.match(tokens(80)) == 48
    manager.step([seq], [1])
    assert len(blocks(seq)) == 4
    manager.commit([seq], [64])
    assert manager.match(tokens(80)) == 64
    manager.step([seq], [1])
    assert len(blocks(seq)) == 5


def test_vllm_hits_are_not_evicted_by_their_own_allocation(manager):
    finish(manager, start(manager, tokens(64)))
    seq = manager.create(np.concatenate([tokens(64), tokens(96, 500)]))
    assert seq.num_cached_tokens == 64
    hits = blocks(seq)
    assert manager.step([seq], [96]) is not None
    assert blocks(seq)[:4] == hits and manager.num_used_blocks == 10


def test_vllm_not_enough_blocks_changes_no_reference(manager):
    finish(manager, start(manager, tokens(64)))
    holder = start(manager, tokens(64, 500))
    seq = manager.create(np.concatenate([tokens(64), tokens(112, 900)]))
    before = manager.stats()
    assert manager.step([seq], [112]) is None
    assert manager.stats() == before and holder.num_computed_tokens == 64
    manager.validate()


def test_vllm_a_wholly_cached_prompt_computes_its_last_token_alone(manager):
    finish(manager, start(manager, tokens(64)))
    seq = manager.create(tokens(64))
    assert seq.num_cached_tokens == 63  # not 48: the last block is copied, not computed again
    assert len(manager.step([seq], [1]).copies) == 1


def test_vllm_caching_off_never_hits():
    manager = quire.KVCacheManager(10, SIZE, prefix_caching=False)
    finish(manager, start(manager, tokens(64)))
    assert manager.match(tokens(64)) == 0 and manager.num_free_blocks == 10


def test_vllm_salts_separate(manager):
    finish(manager, start(manager, tokens(48), salt="a"))
    assert manager.match(tokens(49), salt="a") == 48
    assert manager.match(tokens(49), salt="b") == manager.match(tokens(49)) == 0


def test_vllm_equal_blocks_of_two_requests_become_one(manager):
    first, second = manager.create(tokens(64)), manager.create(tokens(64))
    manager.step([first, second], [64, 64])
    assert manager.num_used_blocks == 8
    manager.commit([first, second])
    assert blocks(first) == blocks(second) and manager.num_used_blocks == 4


def test_vllm_nothing_leaks_when_all_requests_have_ended(manager):
    rng = np.random.default_rng(0)
    for turn in range(50):
        seqs = [manager.create(tokens(int(n), turn % 3)) for n in rng.integers(1, 50, 3)]
        left = [seq.num_tokens - seq.num_computed_tokens for seq in seqs]
        if manager.step(seqs, left) is not None and turn % 2:
            manager.commit(seqs)
        finish(manager, *seqs)
    assert manager.num_used_blocks == 0 and manager.num_used_tokens == 0


def test_vllm_blocks_of_steps_in_flight_come_back_with_their_step():
    manager = quire.KVCacheManager(8, SIZE, prefix_caching=False, async_depth=2)
    first, second = manager.create(tokens(32)), manager.create(tokens(32))
    one = manager.step([first], [32])
    two = manager.step([second], [32])
    manager.free([first, second])
    assert manager.num_free_blocks == 4 and manager.stats().fenced_blocks == 4
    manager.retire(one.ticket)
    assert manager.num_free_blocks == 4  # freed while the second step ran too
    manager.retire(two.ticket)
    assert manager.num_free_blocks == 8 and manager.stats().fenced_blocks == 0


def test_vllm_a_copied_block_lives_until_its_copy_has_run():
    manager = quire.KVCacheManager(8, SIZE, async_depth=1)
    first = manager.create(tokens(32))
    manager.retire(manager.step([first], [32]).ticket)
    manager.commit([first])
    second = manager.create(np.append(tokens(24), np.int32(-5)))
    batch = manager.step([second], [1])
    source = int(batch.copies[0, 0])
    manager.free([first])
    others = manager.create(tokens(96, 700))
    with pytest.raises(ValueError, match="retire"):
        manager.step([others], [80])
    assert source not in blocks(second)
    manager.retire(batch.ticket)
    assert manager.step([others], [96]) is not None


def test_vllm_a_reset_while_in_use_leaves_what_is_used_and_after_free_nothing(manager):
    seq = start(manager, tokens(48))
    finish(manager, start(manager, tokens(32, 500)))
    assert manager.clear_cache() == 2
    assert manager.match(tokens(48)) == 47 and manager.match(tokens(32, 500)) == 0
    finish(manager, seq)
    assert manager.clear_cache() == 3 and manager.clear_cache() == 0
    assert manager.match(tokens(48)) == 0 and manager.num_free_blocks == 10
    manager.validate()


def test_vllm_events_are_stored_a_block_and_removed_with_the_reset():
    manager = quire.KVCacheManager(10, SIZE, event_capacity=100)
    finish(manager, start(manager, tokens(48)))
    stored = manager.take_events()
    keys = [bytes(key) for key in quire.chain_keys(tokens(48), SIZE)]
    assert [event.kind for event in stored] == ["stored"] * 3
    assert [event.key for event in stored] == keys
    root = hashlib.sha256(b"quire.chain_key.v1\n").digest()  # where vLLM has no parent
    assert [event.parent for event in stored] == [root, *keys[:2]]
    assert manager.clear_cache() == 3
    removed = manager.take_events()
    assert [event.kind for event in removed] == ["removed"] * 3
    assert [event.key for event in removed] == keys[::-1]  # no block without its prefix
    assert manager.stats().evicted_blocks == 0 and manager.num_cached_blocks == 0


def test_vllm_of_a_window_only_the_tail_need_be_cached():
    groups = [quire.LayerGroup(), quire.LayerGroup("sliding_window", window=SIZE)]
    manager = quire.KVCacheManager(20, SIZE, groups=groups)
    finish(manager, start(manager, tokens(80)))
    seq = manager.create(tokens(100))
    assert seq.num_cached_tokens == 80
    assert (seq.block_tables[1][:4] == -1).all() and seq.block_tables[1][4] >= 0


def test_vllm_a_miss_that_takes_the_whole_pool_evicts_in_the_order_of_the_queue():
    manager = quire.KVCacheManager(10, SIZE, event_capacity=100)
    first, second = start(manager, tokens(64)), start(manager, tokens(48, 500))
    order = blocks(first)[::-1] + blocks(second)[::-1]  # each tail before its head
    finish(manager, first)
    finish(manager, second)
    manager.take_events()
    seq = manager.create(tokens(160, 900))
    assert manager.step([seq], [160]) is not None
    evicted = manager.take_events()
    assert [event.kind for event in evicted] == ["evicted"] * 7
    assert [event.block for event in evicted] == order and blocks(seq)[3:] == order


def test_vllm_two_requests_freed_in_turn_queue_one_behind_the_other():
    manager = quire.KVCacheManager(10, SIZE, event_capacity=100)
    first, second = start(manager, text(48, 1, 7)), start(manager, text(48, 2, 7))
    prefix, tails = blocks(first)[:3], [blocks(first)[3], blocks(second)[3]]
    finish(manager, first)
    assert manager.num_cached_blocks == 1  # the other still holds the prefix
    finish(manager, second)
    manager.take_events()
    seq = manager.create(tokens(160, 900))
    assert manager.step([seq], [160]) is not None
    assert [event.block for event in manager.take_events()] == [*tails, *prefix[::-1]]


def test_vllm_a_reused_block_loses_its_key_before_it_gets_another():
    manager = quire.KVCacheManager(2, SIZE, event_capacity=100)
    finish(manager, start(manager, tokens(32)))
    old = {event.block: event.key for event in manager.take_events()}
    seq = manager.create(tokens(32, 500))
    assert manager.step([seq], [32]) is not None
    evicted = manager.take_events()
    assert [event.kind for event in evicted] == ["evicted"] * 2
    assert {event.block: event.key for event in evicted} == old
    assert manager.match(tokens(32)) == manager.match(tokens(32, 500)) == 0
    manager.commit([seq])
    stored = manager.take_events()
    assert [event.kind for event in stored] == ["stored"] * 2
    assert [event.block for event in stored] == blocks(seq)
    assert {event.block for event in stored} == old.keys()
    assert not {event.key for event in stored} & set(old.values())


def test_vllm_another_image_has_other_ids_and_no_hit(manager):
    def prompt(image: int) -> np.ndarray:  # ids of contents, beyond every vocabulary
        return np.concatenate([tokens(20), np.full(20, (1 << 24) + image, np.int32), tokens(20)])

    finish(manager, start(manager, prompt(1)))
    assert manager.match(prompt(1)) == 59 and manager.match(prompt(2)) == 20


def test_vllm_a_tenant_named_as_an_adapter_is_another_namespace(manager):
    finish(manager, start(manager, tokens(48), salt="adapter=a"))
    for salt in ("a", "tenant=a", "", "adapter=a\0", None):
        assert manager.match(tokens(49), salt=salt) == 0
    assert manager.match(tokens(49), salt="adapter=a") == 48


def test_vllm_who_computes_what_another_session_did_stores_nothing():
    manager = quire.KVCacheManager(10, SIZE, event_capacity=100)
    first = start(manager, tokens(48))
    assert len(manager.take_events()) == 3
    second = start(manager, tokens(48))
    assert manager.take_events() == []
    finish(manager, first, second)


def test_vllm_local_hits_are_held_before_stores_are_asked():
    cache = quire.KVCache(1, 10, SIZE, 1, 4, "float32")
    tiers = quire.KVTiers(
        manager := quire.KVCacheManager(10, SIZE),
        cache,
        [quire.HostStore(1 << 20, cache.block_bytes)],
    )
    whole = start(manager, tokens(128))
    cache.k(0)[blocks(whole)] = 7.0
    finish(manager, whole)
    other = manager.create(tokens(112, 500))
    assert manager.step([other], [112]) is not None  # evicts the last five of them
    assert tiers.offload() == 5
    tiers.drain()
    manager.commit([other])
    finish(manager, other)
    again = manager.create(tokens(129))
    local = blocks(again)
    assert again.num_cached_tokens == 48 and len(local) == 3
    assert tiers.fetch(again) == 80  # takes five blocks of `other`, none of the hit
    assert blocks(again)[:3] == local and again.num_cached_tokens == 128
    assert (cache.k(0)[blocks(again)] == 7.0).all()
    manager.validate()


def test_vllm_a_partial_block_that_is_continued_is_found_in_full(manager):
    finish(manager, start(manager, tokens(21)))
    assert manager.match(tokens(40)) == 21
    seq = manager.create(tokens(33))
    assert seq.num_cached_tokens == 21
    assert len(manager.step([seq], [12]).copies) == 1
    manager.commit([seq])
    finish(manager, seq)
    assert manager.match(tokens(40)) == 33 and manager.match(tokens(32)) == 31


def test_vllm_a_reset_clears_partial_blocks(manager):
    finish(manager, start(manager, tokens(21)))
    assert manager.clear_cache() == 2 and manager.match(tokens(40)) == 0
    assert manager.num_free_blocks == 10


# ---- vLLM: scheduler


def test_vllm_a_preempted_request_is_counted_once(manager):
    scheduler = quire.Scheduler(manager, watermark=0.0)
    for first in (0, 500):
        scheduler.add(tokens(64, first), 30)
    while (batch := scheduler.schedule()) is not None:
        scheduler.commit(np.zeros(len(batch.sampling), np.int32))
    assert scheduler.num_preemptions > 0
    stats = manager.stats()
    assert stats.prefix_query_tokens == 128 and stats.prefix_hit_tokens == 0


def test_vllm_whoever_ends_or_is_preempted_in_flight_keeps_its_blocks_until_its_step_has_run():
    manager = quire.KVCacheManager(12, SIZE, prefix_caching=False, async_depth=2, num_host_blocks=4)
    scheduler = quire.Scheduler(manager, max_tokens_per_step=64)
    requests = [scheduler.add(tokens(30, 100 * i), 20) for i in range(2)]
    one = scheduler.schedule().ticket
    scheduler.commit(np.zeros(2, np.int32))
    two = scheduler.schedule().ticket
    scheduler.finish(requests[0])  # an abort, two steps deep
    assert manager.num_free_blocks == 8 and manager.stats().fenced_blocks == 2
    scheduler.commit(np.zeros(2, np.int32))
    manager.retire(one)
    assert manager.num_free_blocks == 8 and manager.stats().fenced_blocks == 2
    manager.retire(two)
    assert manager.num_free_blocks == 10 and manager.stats().fenced_blocks == 0
    other = manager.create(tokens(64))
    three = manager.step([other], [64]).ticket
    assert len(manager.swap_out(other)) == 0  # preempted before anything is computed
    assert manager.num_free_blocks == 6 and manager.stats().fenced_blocks == 4
    manager.retire(three)
    assert manager.num_free_blocks == 10
    scheduler.finish(requests[1])
    manager.free([other])
    assert manager.num_free_blocks == 12
    manager.validate()


def test_vllm_blocks_that_are_being_loaded_are_nobody_elses():
    manager = quire.KVCacheManager(6, SIZE)
    store = quire.HostStore(1 << 20, 64)
    manager.attach_store(store)
    for key in quire.chain_keys(tokens(48), SIZE):
        store.put(bytes(key), np.zeros(64, np.uint8)).wait()
    seq = manager.create(tokens(49))
    loads = manager.fetch(seq)
    loaded = [load.block for load in loads]
    other = manager.create(tokens(80, 500))
    assert len(loaded) == 3 and manager.step([other], [64]) is None
    assert manager.step([other], [48]) is not None and not set(blocks(other)) & set(loaded)
    with pytest.raises(ValueError, match="fetch"):
        manager.free([seq])
    manager.fetched(seq, 2)  # the third did not come: its block is free again
    assert blocks(seq) == loaded[:2] and manager.num_free_blocks == 1
    manager.commit([other])
    finish(manager, seq, other)


def test_vllm_with_nothing_in_flight_blocks_come_back_at_once():
    manager = quire.KVCacheManager(8, SIZE, prefix_caching=False, async_depth=3)
    seq = manager.create(tokens(32))
    manager.retire(manager.step([seq], [32]).ticket)
    manager.commit([seq])
    manager.free([seq])
    assert manager.num_free_blocks == 8 and manager.stats().fenced_blocks == 0


def test_vllm_a_reset_after_preempting_all_leaves_nothing_and_they_go_on():
    manager = quire.KVCacheManager(10, SIZE, num_host_blocks=6)
    seqs = [start(manager, tokens(40)), start(manager, tokens(40, 500))]
    for seq in seqs:
        assert len(manager.swap_out(seq)) == 3
    assert manager.clear_cache() == 6 and manager.num_free_blocks == 10
    for seq in seqs:
        assert len(manager.swap_in(seq)) == 3  # all of it: nothing is cached
        assert seq.num_computed_tokens == 40
    manager.commit(seqs, [1, 2])
    assert manager.step(seqs, [1, 1]) is not None
    manager.commit(seqs)
    finish(manager, *seqs)
