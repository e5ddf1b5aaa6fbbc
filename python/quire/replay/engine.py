# SPDX-License-Identifier: Apache-2.0
"""Runs a trace through Scheduler and KVCacheManager under one policy, and counts.

All requests are queued from the start in order of arrival, so the replay is saturated: it goes as
fast as the memory allows and says nothing about latency under the trace's own arrival times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import quire

from .policies import Policy
from .samples import Sample, Samples
from .tokens import TokenSource
from .trace import Int64Array, Trace

_UPDATE_SECONDS = 0.1  # between calls of `update`


class Layer(Protocol):
    """What computes the steps: attention.AttentionLayer, or nothing."""

    def step(self, batch: Any) -> None:
        """Writes K and V of the step's tokens and computes their attention."""


@dataclass(frozen=True)
class Limits:
    """How much one step may hold."""

    max_tokens_per_step: int
    max_seqs: int


class Replay:
    """One policy's run: its figures so far, and in the end."""

    def __init__(self, trace: Trace, policy: Policy, limits: Limits, source: TokenSource) -> None:
        """Make the manager and the scheduler; nothing is queued yet."""
        self.trace = trace
        self.policy = policy
        self.limits = limits
        self.samples = Samples()
        self.steps = 0
        self.done = 0  # requests
        self.seconds = 0.0
        self.bookkeeping_seconds = 0.0  # schedule() and commit()
        self.max_running = 0
        self.output_tokens = 0
        self.admitted = 0  # requests, each at its first admission; so are the next four
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.countable_ids = 0
        self.found_ids = 0
        self.leaked_blocks = 0
        self._source = source
        self._queued = 0
        self._manager = quire.KVCacheManager(
            policy.num_blocks, policy.block_size, policy.prefix_caching
        )
        self._scheduler = quire.Scheduler(
            self._manager,
            max_tokens_per_step=limits.max_tokens_per_step,
            max_seqs=limits.max_seqs,
            watermark=policy.watermark,
        )

    @property
    def running(self) -> int:
        """Sequences that hold memory."""
        return int(self._scheduler.num_running)

    @property
    def waiting(self) -> int:
        """Requests without memory: not yet admitted, or preempted."""
        return int(self._scheduler.num_waiting) + len(self.trace) - self._queued

    @property
    def preemptions(self) -> int:
        """Sequences that lost their memory so far, to be computed again."""
        return int(self._scheduler.num_preemptions)

    @property
    def used_share(self) -> float:
        """Share of the blocks that sequences hold."""
        return int(self._manager.num_used_blocks) / self.policy.num_blocks

    @property
    def tokens(self) -> int:
        """Prompt tokens of the requests admitted so far, and output tokens."""
        return self.prompt_tokens + self.output_tokens

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that the prefix cache held at first admission."""
        return self.cached_tokens / max(self.prompt_tokens, 1)

    def run(self, layer: Layer | None, update: Callable[[Replay], None]) -> None:
        """Replays the whole trace; `update` is called about ten times a second."""
        clock = time.perf_counter
        scheduler, output = self._scheduler, self._source.output
        schedule, commit = scheduler.schedule, scheduler.commit
        start = clock()
        next_update = next_sample = 0.0
        self._queue()
        while True:
            before = clock()
            batch = schedule()
            scheduled = clock()
            if batch is None:
                break
            requests = batch.request_ids
            if requests[-1] >= self.admitted:  # admitted in order, behind those that run
                self._count_admissions(batch)
            if layer is not None:
                layer.step(batch)
            if self.steps >= next_sample:
                next_sample = self._sample(start)
            sampling = batch.sampling
            sampled = output(requests[sampling], batch.seq_lens[sampling])
            computed = clock()
            finished = commit(sampled)
            after = clock()
            self.bookkeeping_seconds += scheduled - before + after - computed
            self.steps += 1
            self.output_tokens += len(sampled)
            if len(finished):
                self.done += len(finished)
                self._queue()
            if after >= next_update:
                self.seconds = after - start
                update(self)
                next_update = after + _UPDATE_SECONDS
        self.seconds = clock() - start
        self._check_end()

    def _queue(self) -> None:
        """Adds requests until as many wait as one step could admit."""
        end, lengths = len(self.trace), self.trace.output_lengths
        while self._queued < end and self._scheduler.num_waiting < self.limits.max_seqs:
            request = self._queued
            self._scheduler.add(self._source.prompt(request), int(lengths[request]))
            self._queued += 1

    def _count_admissions(self, batch: Any) -> None:
        new = batch.request_ids >= self.admitted
        requests = batch.request_ids[new]
        cached = (batch.seq_lens - batch.num_new_tokens)[new].astype(np.int64)
        lengths = self.trace.input_lengths[requests]
        self.admitted = int(requests[-1]) + 1
        self.prompt_tokens += int(lengths.sum())
        self.cached_tokens += int(cached.sum())
        self.max_running = max(self.max_running, self.running)
        if self.trace.hash_block_size:
            found, countable = self._count_ids(requests, lengths, cached)
            self.found_ids += found
            self.countable_ids += countable

    def _count_ids(
        self, requests: Int64Array, lengths: Int64Array, cached: Int64Array
    ) -> tuple[int, int]:
        """How many ids of the requests were found cached, of how many that can be.

        The last token is always computed. So an id counts where a part of it can be cached at all,
        and is found when all of that part was.
        """
        size = self.trace.hash_block_size
        most = lengths - 1
        ids = np.diff(self.trace.hash_begin)[requests]
        countable = np.minimum(ids, -(-most // size))
        found = np.minimum(np.where(cached >= most, countable, cached // size), countable)
        return int(found.sum()), int(countable.sum())

    def _sample(self, start: float) -> float:
        manager = self._manager
        sample = Sample(
            self.steps,
            time.perf_counter() - start,
            manager.num_used_tokens,
            manager.num_used_blocks,
            manager.num_cached_blocks,
            self.running,
            self.waiting,
            self.hit_rate,
        )
        return self.samples.add(sample)

    def _check_end(self) -> None:
        """Everything asked for was done, and all memory came back."""
        expected = int(self.trace.output_lengths.sum())
        if self.done != len(self.trace) or self.output_tokens != expected:
            raise RuntimeError(
                f"replay: {self.policy.name}: expected {len(self.trace)} requests and {expected}"
                f" output tokens, got {self.done} and {self.output_tokens}"
            )
        self._manager.validate()
        self.leaked_blocks = int(self._manager.num_used_blocks)
