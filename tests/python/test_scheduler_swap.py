# SPDX-License-Identifier: Apache-2.0
"""A Scheduler that swaps, with a real cache: attention sees the same bits as without."""

from __future__ import annotations

import numpy as np
import pytest
import quire

SIZE, LAYERS, HEADS, DIM = 4, 2, 2, 8
CHEAP = {"seconds_per_token": 1.0, "bytes_per_second": 1e9, "bytes_per_block": 4096}


class Engine:
    """A model of two layers whose K and V depend on token, position and layer alone."""

    def __init__(self, num_host_blocks=0, stores=(), num_blocks=12, **config):
        self.manager = quire.KVCacheManager(num_blocks, SIZE, num_host_blocks=num_host_blocks)
        self.cache = quire.KVCache(LAYERS, num_blocks, SIZE, HEADS, DIM, "float32")
        self.tiers = quire.KVTiers(self.manager, self.cache, stores)
        self.scheduler = quire.Scheduler(self.manager, watermark=0.0, **config)
        self.num_out = self.num_in = 0

    def kv(self, batch, layer):
        salt = np.arange(HEADS * DIM).reshape(HEADS, DIM)
        x = (batch.token_ids * 7 + batch.positions * 13 + layer)[:, None, None] + salt
        return np.sin(x).astype(np.float32), np.cos(x).astype(np.float32)

    def attend(self, batch, row):
        """The bits of a fixed query's attention over the tokens of a row, all layers."""
        q = np.sin(np.arange(4 * DIM)).reshape(1, 4, DIM).astype(np.float32)
        table, length = batch.block_table[row : row + 1], batch.seq_lens[row : row + 1]
        table = np.ascontiguousarray(table[:, : -(-int(length[0]) // SIZE)])
        return b"".join(
            quire.paged_attention(q, self.cache.k(n), self.cache.v(n), table, length).tobytes()
            for n in range(LAYERS)
        )

    def run(self):
        """What attention gave each request at each length, as it first reached it."""
        outputs = {}
        while (batch := self.scheduler.schedule()) is not None:
            self.num_out += len(batch.swap_out)
            self.num_in += len(batch.swap_in)
            self.tiers.swap(batch)
            for layer in range(LAYERS):
                k, v = self.cache.k(layer), self.cache.v(layer)
                quire.copy_blocks(k, v, batch.copies)
                quire.append_kv(*self.kv(batch, layer), k, v, batch.slot_mapping)
            sampled = []
            for row in batch.sampling:
                key = int(batch.request_ids[row]), int(batch.seq_lens[row])
                outputs[key] = self.attend(batch, row)
                sampled.append((key[0] * 31 + key[1] * 17) % 1000)
            self.scheduler.commit(np.array(sampled, np.int32))
            self.scheduler.validate()
        assert not self.scheduler.has_work and self.manager.num_used_blocks == 0
        assert self.manager.stats().swapped_blocks == 0
        return outputs


def add_requests(engine, count=6):
    for i in range(count):
        prompt = np.concatenate([np.arange(5), np.arange(100 * i, 100 * i + 4 + i)])
        engine.scheduler.add(prompt.astype(np.int32), 16)


@pytest.mark.parametrize("num_host_blocks", [5, 64])
def test_attention_sees_the_same_bits(num_host_blocks):
    plain, swapping = Engine(), Engine(num_host_blocks, preemption=quire.PreemptionCosts(**CHEAP))
    for engine in (plain, swapping):
        add_requests(engine)
    expected = plain.run()
    assert len(expected) == 6 * 16 and plain.scheduler.num_preemptions > 0
    assert swapping.run() == expected
    assert plain.num_out == plain.num_in == 0
    assert swapping.num_out >= swapping.num_in > 0


def test_stores_get_what_is_evicted_beside():
    block_bytes = quire.KVCache(LAYERS, 1, SIZE, HEADS, DIM, "float32").block_bytes
    plain = Engine()
    store = quire.HostStore(100 * block_bytes, block_bytes)
    swapping = Engine(64, [store], preemption=quire.PreemptionCosts(**CHEAP))
    for engine in (plain, swapping):
        add_requests(engine)
    assert swapping.run() == plain.run() and swapping.num_in > 0
    swapping.tiers.drain()
    assert store.stats()["failed"] == 0


def test_ended_while_swapped_out():
    engine = Engine(64, preemption=quire.PreemptionCosts(**CHEAP))
    add_requests(engine)
    while True:
        batch = engine.scheduler.schedule()
        engine.tiers.swap(batch)
        engine.scheduler.commit(np.zeros(len(batch.sampling), np.int32))
        if len(batch.swap_out):
            break
    assert "tokens move to host memory" in engine.scheduler.explain()
    assert batch.swap_out.dtype == np.int32 and batch.swap_out.shape[1] == 2
    assert engine.manager.stats().swapped_blocks == len(batch.swap_out)
    for request_id in range(6):
        engine.scheduler.finish(request_id)
        engine.scheduler.validate()
    assert engine.manager.stats().swapped_blocks == engine.manager.num_used_blocks == 0


def test_without_costs_or_host_blocks_nothing_is_swapped():
    for engine in (Engine(64), Engine(0, preemption=quire.PreemptionCosts(**CHEAP))):
        add_requests(engine)
        engine.run()
        assert engine.scheduler.num_preemptions > 0 and engine.num_out == 0


def test_costs():
    costs = quire.PreemptionCosts(**CHEAP)
    assert (costs.seconds_per_token, costs.seconds_per_token_pair) == (1.0, 0.0)
    assert (costs.bytes_per_second, costs.seconds_per_swap) == (1e9, 0.0)
    assert costs.bytes_per_block == 4096
    with pytest.raises(ValueError, match="Scheduler: preemption: expected costs of 0 or more"):
        Engine(preemption=quire.PreemptionCosts(seconds_per_token=-1.0))
