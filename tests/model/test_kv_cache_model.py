# SPDX-License-Identifier: Apache-2.0
"""KVCacheManager against the plain reference, through random calls, with a toy engine behind.

The engine's KV of a token is the token itself, so that whatever a sequence's slots hold must read
back as its tokens, after any mix of sharing, copying, eviction and rollback.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import pytest
import quire
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import Key, Reference

# Leading tokens of one of two texts, then maybe another word: prefixes are often shared.
TOKENS = st.builds(
    lambda text, length, end: [text] * length + end,
    st.integers(0, 1),
    st.integers(1, 14),
    st.lists(st.integers(0, 1), max_size=3),
)
SALTS = st.sampled_from([None, None, None, "", "a"])
PICK = st.integers(0, 10**6)


@functools.cache
def key_of(key: Key, block_size: int) -> bytes:
    """The chain key of a cached block, by the written rule."""
    salt, tokens = key
    root = b"quire.chain_key.v1\n" + (b"" if salt is None else b"salt=" + salt.encode())
    digest = hashlib.sha256(root).digest()
    for begin in range(0, len(tokens), block_size):
        part = np.array(tokens[begin : begin + block_size], "<i4").tobytes()
        digest = hashlib.sha256(digest + part).digest()
    return digest


class ManagerMachine(RuleBasedStateMachine):
    """Pairs of (handle, reference sequence) that live side by side."""

    @initialize(
        num_blocks=st.integers(4, 16),
        block_size=st.integers(1, 4),
        caching=st.sampled_from([True, True, False]),
        depth=st.sampled_from([0, 0, 0, 1, 2]),
        eviction=st.sampled_from(["lru", "reuse_lru"]),
    )
    def start(
        self, num_blocks: int, block_size: int, caching: bool, depth: int, eviction: str
    ) -> None:
        self.manager = quire.KVCacheManager(
            num_blocks, block_size, caching, depth, eviction=eviction, event_capacity=1000
        )
        self.eviction = eviction
        self.cached: dict[int, tuple[bytes, bytes]] = {}  # by replaying events: key and parent
        self.reference = Reference(num_blocks, block_size, caching, depth)
        self.kv = np.full((num_blocks, block_size), -1, np.int64)
        self.mirror: dict[int, int] = {}
        self.mirror_shape = (0, 0)
        self.live: list = []
        self.in_flight: dict[int, set[int]] = {}  # ticket -> blocks that its step reads or writes

    def some(self, data: st.DataObject) -> list:
        return data.draw(st.lists(st.sampled_from(self.live), unique_by=id, max_size=4))

    @precondition(lambda self: len(self.live) < 8)
    @rule(tokens=TOKENS, salt=SALTS, data=st.data(), computes=st.booleans())
    def create(
        self, tokens: list[int], salt: str | None, data: st.DataObject, computes: bool
    ) -> None:
        hits = self.reference.hits(tokens, salt)[1]
        assert self.manager.match(np.array(tokens, np.int32), salt) == hits
        seq = self.manager.create(np.array(tokens, np.int32), salt)
        assert seq.num_cached_tokens == hits
        self.live.append((seq, self.reference.create(tokens, salt)))
        if computes:
            self.step_pairs(data, self.live[-1:], [seq.num_tokens - hits], commits=True)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), commits=st.booleans())
    def step(self, data: st.DataObject, commits: bool) -> None:
        pairs = self.some(data)
        left = [len(ref.tokens) - ref.computed for _, ref in pairs]
        counts = [data.draw(st.integers(0, n) | st.just(n)) for n in left]
        self.step_pairs(data, pairs, counts, commits)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def engine_step(self, data: st.DataObject) -> None:
        """What engines do most: everybody's next tokens, and a commit."""
        if self.in_flight and len(self.in_flight) == self.reference.depth:
            self.retire(0)
        counts = [min(3, len(ref.tokens) - ref.computed) for _, ref in self.live]
        self.step_pairs(data, list(self.live), counts, commits=True)

    def step_pairs(
        self, data: st.DataObject, pairs: list, counts: list[int], commits: bool
    ) -> None:
        if self.reference.depth and len(self.in_flight) == self.reference.depth:
            with pytest.raises(ValueError, match="retire"):
                self.manager.step([seq for seq, _ in pairs], counts)
            return
        batch = self.take_step(pairs, [seq for seq, _ in pairs], counts)
        if batch is not None and commits:
            self.commit_pairs(data, pairs)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_steps=st.integers(1, 12))
    def decode_on(self, data: st.DataObject, num_steps: int) -> None:
        """The same sequences, one token each, step after step, with arrays; nothing between."""
        pairs = self.some(data)
        ids = np.array([seq.id for seq, _ in pairs], np.int64)
        rng = np.random.default_rng(num_steps)
        for turn in range(num_steps + 1):
            while self.reference.depth and len(self.in_flight) == self.reference.depth:
                self.retire(0)
            left = [len(ref.tokens) - ref.computed for _, ref in pairs]
            counts = np.array(left if turn == 0 else np.ones(len(ids)), np.int32)
            if turn > 0 and left != [1] * len(left):
                return
            if self.take_step(pairs, ids, counts) is None:
                return
            sampled = rng.integers(0, 2, len(ids), np.int32)
            self.manager.commit(ids, sampled)
            self.reference.commit([ref for _, ref in pairs], sampled[:, None].tolist())
            for seq, ref in pairs:
                assert (seq.num_computed_tokens, seq.num_tokens) == (ref.computed, len(ref.tokens))

    def take_step(self, pairs: list, seqs: list | np.ndarray, counts) -> quire.StepBatch | None:
        before = {id(ref): self.blocks_of(seq) for seq, ref in pairs}
        batch = self.manager.step(seqs, counts)
        self.follow_evictions()
        copies = self.reference.step([ref for _, ref in pairs], list(counts))
        assert (batch is None) == (copies is None)
        if batch is None:
            return None
        assert sum(len(group.copies) for group in batch.groups) == copies
        fresh = {b for seq, ref in pairs for b in self.blocks_of(seq) - before[id(ref)]}
        assert not fresh & set().union(*self.in_flight.values()), "reused under a running step"
        self.run_model(batch, pairs, counts)
        self.apply_changes(batch)
        return batch

    def blocks_of(self, seq: quire.Sequence) -> set[int]:
        return {block for table in seq.block_tables for block in table.tolist()} - {-1}

    def apply_changes(self, batch: quire.StepBatch) -> None:
        """A copy of the block table, kept up to date by its changes alone."""
        table = batch.block_table
        shape = (table.strides[0] // 4, table.ctypes.data)
        if shape != self.mirror_shape:
            self.mirror_shape, self.mirror = shape, {}
        self.mirror.update(batch.changes.tolist())
        size = self.reference.size
        for row, length in enumerate(batch.seq_lens.tolist()):
            for column in range(-(-length // size)):
                assert self.mirror[row * shape[0] + column] == table[row, column]

    def run_model(self, batch: quire.StepBatch, pairs: list, counts: list[int]) -> None:
        sources, targets = batch.copies[:, 0], batch.copies[:, 1]
        assert not set(sources) & set(targets) and len(set(targets)) == len(targets)
        self.kv[targets] = self.kv[sources]
        touched = set(sources.tolist())
        size = self.reference.size
        for i, ((seq, ref), count) in enumerate(zip(pairs, counts, strict=True)):
            first, end = batch.cu_seqlens_q[i : i + 2]
            assert end - first == count and batch.seq_lens[i] == ref.computed + count
            positions = np.arange(ref.computed, ref.computed + count)
            assert np.array_equal(batch.positions[first:end], positions)
            row = batch.block_table[i, : -(-(ref.computed + count) // size)]
            assert np.array_equal(row, seq.block_table[: len(row)])
            slots = batch.slot_mapping[first:end]
            assert np.array_equal(slots, row[positions // size] * size + positions % size)
            self.kv.reshape(-1)[slots] = np.array(ref.tokens)[positions]
            touched |= set(row.tolist())
        if self.reference.depth:
            self.in_flight[batch.ticket] = touched

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.commit_pairs(data, self.some(data))

    def commit_pairs(self, data: st.DataObject, pairs: list) -> None:
        sampled = []
        for _, ref in pairs:
            known = ref.computed + ref.planned == len(ref.tokens) or ref.planned == 0
            room = 30 - len(ref.tokens) if known else 0
            least = min(1, max(0, room))
            more = max(least, min(3, room))
            sampled.append(data.draw(st.lists(st.integers(0, 1), min_size=least, max_size=more)))
        arrays = [np.array(tokens, np.int32) for tokens in sampled]
        if all(len(tokens) == 1 for tokens in sampled):
            arrays = np.array(sampled, np.int32).reshape(-1)
        elif not any(sampled):
            arrays = None
        self.manager.commit([seq for seq, _ in pairs], arrays)
        self.reference.commit([ref for _, ref in pairs], sampled)

    @precondition(lambda self: 0 < len(self.live) < 8)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        seq, ref = self.live[pick % len(self.live)]
        self.live.append((self.manager.fork(seq), self.reference.fork(ref)))

    @precondition(lambda self: self.live)
    @rule(pick=PICK, keep=PICK)
    def truncate(self, pick: int, keep: int) -> None:
        seq, ref = self.live[pick % len(self.live)]
        num_tokens = keep % len(ref.tokens) + 1
        self.manager.truncate(seq, num_tokens)
        self.reference.truncate(ref, num_tokens)

    @precondition(lambda self: len(self.live) > 2)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pairs = self.some(data)
        self.manager.free([seq for seq, _ in pairs])
        self.reference.free([ref for _, ref in pairs])
        self.live = [pair for pair in self.live if pair not in pairs]
        for seq, _ in pairs:
            with pytest.raises(ValueError, match="freed"):
                self.manager.free([seq])

    @precondition(lambda self: self.in_flight)
    @rule(pick=PICK)
    def retire(self, pick: int) -> None:
        ticket = sorted(self.in_flight)[pick % len(self.in_flight)]
        self.manager.retire(ticket)
        self.reference.retire(ticket)
        self.in_flight = {t: blocks for t, blocks in self.in_flight.items() if t > ticket}

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def misuse(self, pick: int) -> None:
        seq, ref = self.live[pick % len(self.live)]
        left = len(ref.tokens) - ref.computed
        for seqs, counts in (([seq], [left + 1]), ([seq], [-1]), ([seq, seq], [0, 0]), ([seq], [])):
            with pytest.raises(ValueError):
                self.manager.step(seqs, counts)
        for sampled in (np.zeros(2, np.int32), [[0], [0]]):
            with pytest.raises(ValueError):
                self.manager.commit([seq], sampled)
        for num_tokens in (0, -1, len(ref.tokens) + 1):
            with pytest.raises(ValueError):
                self.manager.truncate(seq, num_tokens)
        with pytest.raises(ValueError):
            self.manager.free([seq, seq])

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "manager"):
            return
        manager, reference = self.manager, self.reference
        manager.validate()
        used = reference.used_blocks()
        assert manager.num_used_blocks == len(used)
        assert manager.num_cached_blocks == len(reference.idle)
        assert manager.num_free_blocks == reference.free_blocks
        assert manager.num_used_tokens == reference.used_tokens()
        self.replay_events()
        keys = {key_of(key, reference.size) for key in reference.cache}
        assert {key for key, _ in self.cached.values()} == keys
        for seq, ref in self.live:
            assert seq.num_computed_tokens == ref.computed
            assert seq.token_ids.tolist() == ref.tokens
            blocks = seq.block_table
            assert len(blocks) == len(ref.blocks)
            kept = self.kv[blocks].reshape(-1)[: ref.computed]
            assert kept.tolist() == ref.tokens[: ref.computed]

    def follow_evictions(self) -> None:
        """Tells the reference what a step has evicted; it checks that this could go."""
        names = {key_of(key, self.reference.size): key for key in self.reference.cache}
        evicted = [names[key] for key in self.replay_events()]
        if self.eviction == "reuse_lru":
            self.reference.victims = evicted

    def replay_events(self) -> list[bytes]:
        """Follows what is cached; returns the keys that were evicted, in order."""
        evicted = []
        for event in self.manager.take_events():
            if event.kind == "stored":
                assert event.block not in self.cached
                self.cached[event.block] = (event.key, event.parent)
            else:
                assert event.kind == "evicted"
                evicted.append(event.key)
                assert self.cached.pop(event.block) == (event.key, event.parent)
                assert event.key not in {parent for _, parent in self.cached.values()}
        assert self.manager.stats().lost_events == 0
        return evicted

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.free([seq for seq, _ in self.live])
        if self.in_flight:
            self.manager.retire(max(self.in_flight))
        assert self.manager.num_used_blocks == self.manager.num_used_tokens == 0
        self.manager.validate()


ManagerMachine.TestCase.settings = settings(
    max_examples=420,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
test_manager_against_reference = ManagerMachine.TestCase
