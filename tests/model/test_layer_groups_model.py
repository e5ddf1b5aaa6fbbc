# SPDX-License-Identifier: Apache-2.0
"""Layer groups against their plain reference, with a toy engine behind that reads what a layer
reads: the KV of a token names the token and the group; a state is a fold of all tokens before."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import quire
from group_reference import GroupReference
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from test_kv_cache_model import PICK, ManagerMachine

GROUP = st.one_of(
    st.just(("full", 0)),
    st.tuples(st.just("sliding_window"), st.integers(1, 9)),
    st.tuples(st.just("chunked_local"), st.integers(1, 9)),
    st.just(("state", 0)),
)


def layer_group(kind: str, size: int) -> quire.LayerGroup:
    sizes = {"sliding_window": {"window": size}, "chunked_local": {"chunk": size}}
    return quire.LayerGroup(kind, **sizes.get(kind, {}))


def state_of(tokens: list[int]) -> int:
    return reduce(lambda state, token: (state * 31 + token + 7) % 1_000_003, tokens, 0)


class GroupMachine(ManagerMachine):
    """The same calls; a sequence has a table for each group."""

    @initialize(
        num_blocks=st.integers(8, 40),
        block_size=st.integers(1, 4),
        caching=st.sampled_from([True, True, True, False]),
        depth=st.sampled_from([0, 0, 0, 1, 2]),
        others=st.lists(GROUP, min_size=1, max_size=3),
        num_host_blocks=st.sampled_from([6, 60]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        caching: bool,
        depth: int,
        others: list,
        num_host_blocks: int,
    ) -> None:
        self.groups = [("full", 0), *others]
        self.has_state = ("state", 0) in others
        self.manager = quire.KVCacheManager(
            num_blocks,
            block_size,
            caching,
            depth,
            groups=[layer_group(*g) for g in self.groups],
            num_host_blocks=num_host_blocks,
        )
        self.reference = GroupReference(num_blocks, block_size, caching, depth, self.groups)
        self.reference.free_host_blocks = num_host_blocks
        self.kv = np.full((num_blocks, block_size), -1, np.int64)
        self.host = np.full((num_host_blocks, block_size), -1, np.int64)
        self.away: list = []  # pairs, in host memory
        self.mirrors: list[dict[int, int]] = [{} for _ in self.groups]
        self.mirror_shapes = [(0, 0)] * len(self.groups)
        self.live = []
        self.in_flight = {}

    def step_pairs(self, data: st.DataObject, pairs: list, counts: list, commits: bool) -> None:
        # A state that has seen the tokens of a step must not see them again.
        super().step_pairs(data, pairs, counts, commits or self.has_state)

    def follow_evictions(self) -> None:
        pass  # the oldest go first, and no events are asked for

    def apply_changes(self, batch: quire.StepBatch) -> None:
        for i, group in enumerate(batch.groups):
            self.mirror, self.mirror_shape = self.mirrors[i], self.mirror_shapes[i]
            if self.groups[i][0] != "state":
                super().apply_changes(group)
            self.mirrors[i], self.mirror_shapes[i] = self.mirror, self.mirror_shape

    def run_model(self, batch: quire.StepBatch, pairs: list, counts: list[int]) -> None:
        touched: set[int] = set()
        copies = np.concatenate([group.copies for group in batch.groups])
        assert not set(copies[:, 0]) & set(copies[:, 1])
        assert len(set(copies[:, 1])) == len(copies)
        self.kv[copies[:, 1]] = self.kv[copies[:, 0]]
        touched |= set(copies.reshape(-1).tolist())
        for i, ((seq, ref), count) in enumerate(zip(pairs, counts, strict=True)):
            touched |= self.blocks_of(seq)
            for group, step in enumerate(batch.groups):
                assert step.seq_lens[i] == ref.computed + count
                if self.groups[group][0] == "state":
                    self.run_state(step, i, ref, count)
                else:
                    self.run_attention(group, step, i, seq, ref, count)
        if self.reference.depth:
            self.in_flight[batch.ticket] = touched

    def run_state(self, step: quire.StepBatch, row: int, ref, count: int) -> None:
        assert step.block_table.shape[1] <= 1 and len(step.slot_mapping) == 0
        if count == 0:
            return
        block = step.block_table[row, 0]
        if ref.computed:
            assert self.kv[block, 0] == state_of(ref.tokens[: ref.computed])
        self.kv[block, 0] = state_of(ref.tokens[: ref.computed + count])

    def run_attention(
        self, group: int, step: quire.StepBatch, row: int, seq: quire.Sequence, ref, count: int
    ) -> None:
        size, end = self.reference.size, ref.computed + count
        positions = np.arange(ref.computed, end)
        first, last = step.cu_seqlens_q[row : row + 2]
        assert np.array_equal(step.positions[first:last], positions)
        table = step.block_table[row, : -(-end // size)]
        assert np.array_equal(table, seq.block_tables[group][: len(table)])
        slots = step.slot_mapping[first:last]
        assert np.array_equal(slots, table[positions // size] * size + positions % size)
        tokens = np.array(ref.tokens)
        self.kv.reshape(-1)[slots] = tokens[positions] + 10 * group
        for position in positions:
            begin = self.first_read(group, position)
            read = np.arange(begin, position + 1)
            assert (table[read // size] >= 0).all(), "a layer reads what was given back"
            kept = self.kv[table[read // size], read % size]
            assert np.array_equal(kept, tokens[read] + 10 * group)

    def first_read(self, group: int, position: int) -> int:
        kind, size = self.groups[group]
        if kind == "sliding_window":
            return max(0, position - size + 1)
        return position // size * size if kind == "chunked_local" else 0

    @precondition(lambda self: 0 < len(self.live) < 8)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        seq, ref = self.live[pick % len(self.live)]
        if self.has_state and ref.planned:
            with pytest.raises(ValueError, match="is a state"):
                self.manager.fork(seq)
            return
        self.live.append((self.manager.fork(seq), self.reference.fork(ref)))

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def swap_out(self, pick: int) -> None:
        seq, ref = pair = self.live[pick % len(self.live)]
        if self.has_state and ref.planned:
            with pytest.raises(ValueError, match="is a state"):
                self.manager.swap_out(seq)
            return
        pairs = self.manager.swap_out(seq)
        count = self.reference.swap_out(ref)
        assert (None if pairs is None else len(pairs)) == count
        if pairs is not None:
            self.host[pairs[:, 1]] = self.kv[pairs[:, 0]]
            self.live.remove(pair)
            self.away.append(pair)
            assert self.manager.is_swapped_out(seq) and seq.num_computed_tokens == 0

    @precondition(lambda self: self.away)
    @rule(pick=PICK)
    def swap_in(self, pick: int) -> None:
        seq, ref = pair = self.away[pick % len(self.away)]
        pairs = self.manager.swap_in(seq)
        count = self.reference.swap_in(ref)
        assert (None if pairs is None else len(pairs)) == count
        if pairs is not None:
            assert not set(pairs[:, 1].tolist()) & set().union(*self.in_flight.values())
            self.kv[pairs[:, 1]] = self.host[pairs[:, 0]]
            self.away.remove(pair)
            self.live.append(pair)

    @precondition(lambda self: self.away)
    @rule(pick=PICK)
    def free_away(self, pick: int) -> None:
        seq, ref = self.away.pop(pick % len(self.away))
        self.manager.free([seq])
        self.reference.free([ref])

    def teardown(self) -> None:
        if hasattr(self, "away"):
            self.live += self.away
        super().teardown()
        assert not hasattr(self, "manager") or self.manager.stats().swapped_blocks == 0

    @precondition(lambda self: self.live or self.away)
    @rule()
    def restart(self) -> None:
        """A manager made of the snapshot is the same."""
        saved = self.manager.snapshot()
        restored = quire.KVCacheManager.restore(saved)
        restored.validate()
        assert restored.snapshot() == saved

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "manager"):
            return
        manager, reference = self.manager, self.reference
        manager.validate()
        assert manager.num_used_blocks == len(reference.used_blocks())
        assert manager.num_cached_blocks == len(reference.idle)
        assert manager.num_free_blocks == reference.free_blocks
        assert manager.num_used_tokens == reference.used_tokens()
        host_blocks = len(self.host) - reference.free_host_blocks
        assert manager.stats().swapped_blocks == host_blocks
        stats = manager.group_stats()
        for group in range(len(self.groups)):
            idle = sum(key[0] == group for key in reference.idle)
            assert stats[group]["cached_blocks"] == idle
        for seq, ref in self.live:
            assert seq.num_computed_tokens == ref.computed
            assert seq.token_ids.tolist() == ref.tokens
            for table, expected in zip(seq.block_tables, ref.tables, strict=True):
                assert [b >= 0 for b in table] == [b is not None for b in expected]


GroupMachine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_groups_against_reference = GroupMachine.TestCase
