# SPDX-License-Identifier: Apache-2.0
"""Layer groups under real attention: what a group gave back holds NaN, and no result knows."""

from __future__ import annotations

import numpy as np
import pytest
from device import DTYPES, quire

HEADS, KV_HEADS, DIM, BLOCK, WINDOW = 4, 2, 16, 4, 10
RNG = np.random.default_rng(3)
DTYPE = next(iter(DTYPES.values()))
TOLERANCE = 1e-5 if DTYPE == np.float32 else 4e-3
# q, k and v of each token id at each position are functions of the two, so that a prefix's KV is
# the same whoever computes it.
TABLE = RNG.standard_normal((3, 64, 128, HEADS, DIM)).astype(DTYPE)


def q_k_v(tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
    q, k, v = (np.ascontiguousarray(TABLE[i][tokens, positions]) for i in range(3))
    return q, np.ascontiguousarray(k[:, :KV_HEADS]), np.ascontiguousarray(v[:, :KV_HEADS])


class Engine:
    """Two layers over one pool: full attention, and a window."""

    def __init__(self, num_blocks: int, caching: bool) -> None:
        groups = [quire.LayerGroup(), quire.LayerGroup("sliding_window", window=WINDOW)]
        self.manager = quire.KVCacheManager(num_blocks, BLOCK, caching, groups=groups)
        shape = (num_blocks, BLOCK, KV_HEADS, DIM)
        self.k, self.v = np.full((2, *shape), np.nan, DTYPE)

    def poison(self, seqs: list[quire.Sequence]) -> None:
        """NaN in every block that no sequence holds."""
        held = {int(b) for seq in seqs for table in seq.block_tables for b in table}
        free = [b for b in range(self.manager.num_blocks) if b not in held]
        self.k[free] = self.v[free] = np.nan

    def step(self, seqs: list[quire.Sequence], counts: list[int]) -> None:
        batch = self.manager.step(seqs, counts)
        assert batch is not None
        tokens = [
            seq.token_ids[p]
            for seq, first, end in zip(
                seqs, batch.cu_seqlens_q[:-1], batch.cu_seqlens_q[1:], strict=True
            )
            for p in batch.positions[first:end]
        ]
        q, k, v = q_k_v(np.array(tokens), batch.positions)
        for group, window in zip(batch.groups, [(-1, -1), (WINDOW - 1, 0)], strict=True):
            quire.copy_blocks(self.k, self.v, group.copies)
            quire.append_kv(k, v, self.k, self.v, group.slot_mapping)
            out = quire.paged_attention(
                q,
                self.k,
                self.v,
                group.block_table,
                group.seq_lens,
                cu_seqlens_q=group.cu_seqlens_q,
                window=window,
            )
            self.check(out, seqs, batch, window)

    def check(self, out: np.ndarray, seqs: list, batch: quire.StepBatch, window: tuple) -> None:
        for i, seq in enumerate(seqs):
            end = int(batch.seq_lens[i])
            rows = slice(*batch.cu_seqlens_q[i : i + 2])
            q, k, v = q_k_v(seq.token_ids[:end], np.arange(end))
            whole = quire.attention(q[None], k[None], v[None], causal=True, window=window)[0]
            np.testing.assert_allclose(
                np.float32(out[rows]),
                np.float32(whole[batch.positions[rows]]),
                rtol=TOLERANCE,
                atol=TOLERANCE,
            )


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_blocks_behind_the_window_may_hold_anything(chunk: int):
    engine = Engine(num_blocks=64, caching=False)
    seqs = [engine.manager.create(RNG.integers(0, 64, n, np.int32)) for n in (40, 7, 23)]
    for _ in range(60 // chunk):
        todo = [seq for seq in seqs if seq.num_tokens > seq.num_computed_tokens]
        if not todo:
            break
        counts = [min(chunk, seq.num_tokens - seq.num_computed_tokens) for seq in todo]
        engine.step(todo, counts)
        engine.manager.commit(todo)
        engine.poison(seqs)
    assert any(-1 in seq.block_tables[1] for seq in seqs)
    assert all(-1 not in seq.block_tables[0] for seq in seqs)


def test_a_hit_finds_all_that_the_window_reads():
    engine = Engine(num_blocks=64, caching=True)
    prompt = RNG.integers(0, 64, 50, np.int32)
    first = engine.manager.create(prompt)
    engine.step([first], [50])
    engine.manager.commit([first], np.array([5], np.int32))
    second = engine.manager.create(np.concatenate([prompt[:45], [1, 2, 3]]).astype(np.int32))
    assert second.num_cached_tokens == 44
    assert [int((t >= 0).sum()) for t in second.block_tables] == [11, 3]
    child = engine.manager.fork(second)
    for _ in range(30):
        seqs = [first, second, child]
        engine.step(seqs, [seq.num_tokens - seq.num_computed_tokens for seq in seqs])
        engine.manager.commit(seqs, RNG.integers(0, 64, 3, np.int32))
        engine.manager.validate()


def test_entries_that_a_query_sees_are_still_checked():
    k, v = np.zeros((2, 4, BLOCK, KV_HEADS, DIM), DTYPE)
    q = np.zeros((1, HEADS, DIM), DTYPE)
    lens = np.array([16], np.int32)
    behind = np.array([[-1, 99, 2, 3]], np.int32)
    out = quire.paged_attention(q, k, v, behind, lens, window=(7, 0))
    assert not np.isnan(out).any()
    with pytest.raises(ValueError, match=r"block_table\[0, 0\]: expected a block id >= 0, got -1"):
        quire.paged_attention(q, k, v, behind, lens)
    with pytest.raises(ValueError, match="got 99"):
        quire.paged_attention(q, k, v, behind, lens, window=(8, 0))
