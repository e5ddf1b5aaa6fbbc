# SPDX-License-Identifier: Apache-2.0
"""Sequences that begin with the same blocks: right, and the bits that each has alone."""

from __future__ import annotations

import numpy as np
import pytest
import quire
from cases import DTYPES
from oracle import Options, attend, attend_naively
from tolerance import check_lse, check_out

HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 64, 16
# (parent or -1, tokens in common with it, own query rows, tokens): a tree of prefixes.
BATCH = (
    (-1, 0, 1, 1300),
    (0, 1100, 1, 1290),
    (0, 1100, 1, 1111),
    (1, 1150, 3, 1700),
    (0, 540, 1, 1200),
    (4, 1080, 9, 1400),
    (-1, 0, 1, 700),
    (0, 512, 30, 1024),
    (2, 1110, 1, 1600),
)


def make_batch(dtype: str):
    """q of each sequence, caches whose unused slots are NaN, block table, lengths."""
    rng = np.random.default_rng(11)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])

    rows: list[list[int]] = []
    ids = iter(rng.permutation(2000).tolist())
    for parent, common, _, length in BATCH:
        kept = rows[parent][: common // BLOCK] if parent >= 0 else []
        rows.append(kept + [next(ids) for _ in range(-(-length // BLOCK) - len(kept))])
    caches = np.full((2, 2000, BLOCK, KV_HEADS, DIM), np.nan, np.float32).astype(DTYPES[dtype])
    for row, (*_, length) in zip(rows, BATCH, strict=True):
        for i, block in enumerate(row):
            count = min(BLOCK, length - i * BLOCK)
            caches[:, block, :count] = normal(2, count, KV_HEADS, DIM)
    table = np.full((len(BATCH), max(map(len, rows))), -1, np.int32)
    for b, row in enumerate(rows):
        table[b, : len(row)] = row
    qs = [normal(q_len, HEADS, DIM) for _, _, q_len, _ in BATCH]
    return qs, caches, table, np.array([length for *_, length in BATCH], np.int32)


def run(batch, order, window=(-1, -1)) -> list[tuple[np.ndarray, np.ndarray]]:
    qs, caches, table, seq_lens = batch
    cu = np.cumsum([0, *(len(qs[b]) for b in order)], dtype=np.int32)
    out, lse = quire.paged_attention(
        np.concatenate([qs[b] for b in order]),
        *caches,
        np.ascontiguousarray(table[order]),
        seq_lens[order],
        cu_seqlens_q=cu,
        window=window,
        return_lse=True,
    )
    return [(out[a:b], lse[:, a:b]) for a, b in zip(cu, cu[1:], strict=False)]


def bits(result: list[tuple[np.ndarray, np.ndarray]]) -> list[bytes]:
    return [np.ascontiguousarray(x).tobytes() for pair in result for x in pair]


def test_the_batch_does_share():
    _, _, table, seq_lens = make_batch("float32")
    attn = quire.Attention(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float32", block_size=BLOCK
    )
    cu = np.cumsum([0, *(q_len for _, _, q_len, _ in BATCH)], dtype=np.int32)
    assert attn.plan(table, seq_lens, cu).num_shared_items > 0
    assert attn.plan(table[[3]], seq_lens[[3]]).num_shared_items == 0


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("window", [(-1, -1), (900, 0)])
def test_shared_prefixes_agree_with_the_oracle(dtype, window):
    qs, caches, table, seq_lens = batch = make_batch(dtype)
    results = run(batch, list(range(len(BATCH))), window)
    options = Options(causal=True, window=window)
    for b, (out, lse) in enumerate(results):
        blocks = table[b, : -(-seq_lens[b] // BLOCK)]
        k, v = (cache[blocks].reshape(-1, KV_HEADS, DIM)[: seq_lens[b]] for cache in caches)
        exact, exact_lse = attend(qs[b], k, v, options, None)
        naive = attend_naively(qs[b], k, v, options, None)
        check_out(*(np.asarray(x, np.float64) for x in (out, exact, naive)), factor=3.0)
        check_lse(lse, exact_lse, dtype)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("window", [(-1, -1), (900, 0)])
def test_same_bits_alone_and_in_any_company(dtype, window):
    batch = make_batch(dtype)
    alone = [bits(run(batch, [b], window)) for b in range(len(BATCH))]
    before = quire.num_threads()
    rng = np.random.default_rng(3)
    try:
        for threads in (1, 2, 5):
            quire.set_num_threads(threads)
            for size in (len(BATCH), len(BATCH), 5, 2):
                order = rng.permutation(len(BATCH))[:size].tolist()
                expected = [x for b in order for x in alone[b]]
                assert bits(run(batch, order, window)) == expected, (threads, order)
    finally:
        quire.set_num_threads(before)
