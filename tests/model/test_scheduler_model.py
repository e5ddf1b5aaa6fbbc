# SPDX-License-Identifier: Apache-2.0
"""Scheduler under random traffic: all requests finish, tokens are conserved, budgets hold.

The toy model's KV of a token is the token; its next token is a function of all the tokens that a
sequence's slots hold. So each output is known beforehand, however it was batched, and a lost or
foreign KV entry changes it.
"""

from __future__ import annotations

import numpy as np
import pytest
import quire
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule


def next_token(tokens: list[int]) -> int:
    return (sum((i + 1) * token for i, token in enumerate(tokens)) + len(tokens)) % 1000


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, each with all the tokens it must have in the end."""

    @initialize(
        num_blocks=st.integers(2, 20),
        block_size=st.integers(1, 4),
        caching=st.booleans(),
        depth=st.sampled_from([0, 0, 2]),
        budget=st.integers(1, 12),
        max_seqs=st.integers(1, 5),
        watermark=st.sampled_from([0.0, 0.01, 0.2]),
    )
    def start(self, num_blocks, block_size, caching, depth, budget, max_seqs, watermark) -> None:
        self.manager = quire.KVCacheManager(num_blocks, block_size, caching, depth)
        self.scheduler = quire.Scheduler(
            self.manager, max_tokens_per_step=budget, max_seqs=max_seqs, watermark=watermark
        )
        self.budget, self.max_seqs, self.depth = budget, max_seqs, depth
        self.kv = np.full(num_blocks * block_size, -1, np.int64)
        self.unretired: list[int] = []
        self.tokens: list[list[int]] = []  # of each request, as far as they are known
        self.left: dict[int, int] = {}  # request -> tokens to generate
        self.preemptions = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        max_new_tokens=st.integers(1, 12),
    )
    def add(self, prompt: list[int], max_new_tokens: int) -> None:
        if len(prompt) + max_new_tokens > len(self.kv):
            with pytest.raises(ValueError, match="fit"):
                self.scheduler.add(prompt, max_new_tokens)
            return
        request = self.scheduler.add(np.array(prompt, np.int32), max_new_tokens)
        assert request == len(self.tokens)
        self.tokens.append(list(prompt))
        self.left[request] = max_new_tokens

    @rule()
    def step(self) -> None:
        if len(self.unretired) == 2:
            self.manager.retire(self.unretired.pop(0))
        batch = self.scheduler.schedule()
        self.scheduler.validate()
        if batch is None:
            assert self.unretired or not self.scheduler.has_work
            if self.unretired:
                self.manager.retire(self.unretired.pop(0))
            return
        if self.depth:
            self.unretired.append(batch.ticket)
        sampled = self.run_model(batch)
        self.preemptions += batch.num_preempted
        assert self.scheduler.num_preemptions == self.preemptions
        expected = []
        for row, token in zip(batch.sampling, sampled, strict=True):
            request = int(batch.request_ids[row])
            self.tokens[request].append(token)
            self.left[request] -= 1
            if self.left[request] == 0:
                expected.append(request)
                del self.left[request]
        assert self.scheduler.commit(np.array(sampled, np.int32)) == expected
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.left)

    def run_model(self, batch: quire.ScheduledBatch) -> list[int]:
        assert 0 < len(batch.token_ids) <= self.budget
        assert len(batch.request_ids) <= self.max_seqs
        assert np.array_equal(np.diff(batch.cu_seqlens_q), batch.num_new_tokens)
        assert (batch.num_new_tokens > 0).all()
        size = self.manager.block_size
        blocks = self.kv.reshape(-1, size)
        blocks[batch.copies[:, 1]] = blocks[batch.copies[:, 0]]
        self.kv[batch.slot_mapping] = batch.token_ids
        sampled = []
        for row, request in enumerate(batch.request_ids):
            known, length = self.tokens[request], batch.seq_lens[row]
            slots = batch.block_table[row][:, None] * size + np.arange(size)
            assert self.kv[slots].reshape(-1)[:length].tolist() == known[:length]
            assert (row in batch.sampling) == (length == len(known))
            if row in batch.sampling:
                sampled.append(next_token(known))
        return sampled

    @precondition(lambda self: self.left)
    @rule(pick=st.integers(0, 10**6))
    def finish(self, pick: int) -> None:
        request = sorted(self.left)[pick % len(self.left)]
        self.scheduler.finish(request)
        del self.left[request]
        self.scheduler.finish(request)  # once more is harmless
        self.scheduler.validate()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.left, "a request never finished"
        if self.unretired:
            self.manager.retire(self.unretired[-1])
        assert self.manager.num_used_blocks == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_scheduler_under_random_traffic = SchedulerMachine.TestCase
