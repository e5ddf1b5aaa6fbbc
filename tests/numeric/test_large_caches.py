# SPDX-License-Identifier: Apache-2.0
"""64-bit addressing: caches of more than 2^31 elements, in sparse mappings of which little is
touched, through every path that reads or writes them."""

from __future__ import annotations

import mmap

import ml_dtypes
import numpy as np
import pytest
import quire

HEADS, DIM, BLOCK = 2, 128, 16
NUM_BLOCKS = (2**31 + 2**28) // (BLOCK * HEADS * DIM)


def sparse_cache(dtype, layout: str) -> np.ndarray:
    """[NUM_BLOCKS, BLOCK, HEADS, DIM], token-major ("nhd") or head-major memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    size = NUM_BLOCKS * BLOCK * HEADS * DIM * np.dtype(dtype).itemsize
    memory = np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype)
    if layout == "nhd":
        return memory.reshape(NUM_BLOCKS, BLOCK, HEADS, DIM)
    return memory.reshape(NUM_BLOCKS, HEADS, BLOCK, DIM).transpose(0, 2, 1, 3)


def far_and_near(count: int) -> np.ndarray:
    """Block ids from both ends by turns."""
    return np.array([i // 2 if i % 2 else NUM_BLOCKS - 1 - i // 2 for i in range(count)], np.int32)


def slots_of(blocks: np.ndarray, length: int) -> np.ndarray:
    return (blocks.astype(np.int64)[:, None] * BLOCK + np.arange(BLOCK)).ravel()[:length]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("q_len", [1, 40])  # decode, prefill
@pytest.mark.parametrize("batch", [1, 3])  # of several, the first 544 tokens are shared
def test_paged_attention(dtype, layout, q_len, batch):
    rng = np.random.default_rng(0)
    cache, length, common = sparse_cache(dtype, layout), 600, 34
    ids = far_and_near(common + 4 * batch)
    table = np.array([[*ids[:common], *ids[common + b :: batch][:4]] for b in range(batch)])
    ks = rng.standard_normal((batch, length, HEADS, DIM), np.float32).astype(dtype)
    ks[:, : common * BLOCK] = ks[0, : common * BLOCK]
    for row, k in zip(table, ks, strict=True):
        quire.append_kv(k, k, cache, cache, slots_of(row, length))
    assert slots_of(table[0], length).max() * HEADS * DIM > 2**31
    q = rng.standard_normal((batch, q_len, 4, DIM), np.float32).astype(dtype)
    out = quire.paged_attention(
        q.reshape(-1, 4, DIM),
        cache,
        cache,
        table.astype(np.int32),
        np.full(batch, length, np.int32),
        cu_seqlens_q=np.arange(batch + 1, dtype=np.int32) * q_len,
    )
    small = quire.attention(q, ks, ks, causal=True)
    assert out.tobytes() == small.tobytes()


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("q_len", [1, 40])  # decode, prefill
def test_quantised(dtype, q_len):
    """The same tokens in a large cache and in a small one, each with the scales of its tokens."""
    rng = np.random.default_rng(3)
    length, count = 600, 38
    k, v = rng.standard_normal((2, length, HEADS, DIM), np.float32)
    q = rng.standard_normal((q_len, 4, DIM), np.float32)
    results = []
    for caches, ids in (
        ([sparse_cache(dtype, "hnd") for _ in "kv"], far_and_near(count)),
        ([np.zeros((count, BLOCK, HEADS, DIM), dtype) for _ in "kv"], np.arange(count)),
    ):
        scales = [np.zeros(caches[0].shape[:3], np.float32) for _ in "kv"]
        quire.append_kv(k, v, *caches, slots_of(ids, length), k_scale=scales[0], v_scale=scales[1])
        out = quire.paged_attention(
            q,
            *caches,
            ids.astype(np.int32)[None],
            np.array([length], np.int32),
            cu_seqlens_q=np.array([0, q_len], np.int32),
            k_scale=scales[0],
            v_scale=scales[1],
        )
        results.append(out.tobytes())
    assert results[0] == results[1]
    assert np.abs(np.frombuffer(results[0], np.float32)).max() > 0


def test_dense_and_ragged():
    """k and v of which one row lies beyond 2^31 elements: by strides, and by the row's index."""
    rng = np.random.default_rng(1)
    memory = sparse_cache(np.float32, "nhd").reshape(-1, HEADS, DIM)
    far = len(memory) - 50
    memory[far : far + 40] = k = rng.standard_normal((40, HEADS, DIM), np.float32)
    memory[:40] = k
    q = rng.standard_normal((2, 1, HEADS, DIM), np.float32)
    expected = quire.attention(q, np.stack([k, k]), np.stack([k, k]))
    strided = np.lib.stride_tricks.as_strided(
        memory, (2, 40, HEADS, DIM), (far * HEADS * DIM * 4, *memory.strides)
    )
    assert quire.attention(q, strided, strided).tobytes() == expected.tobytes()
    rows = np.array([0, 1, 2, 3], np.int32), np.array([0, 40, far, far + 40], np.int32)
    window = (39, -1)  # of the sequence in between only the last rows are read
    out = quire.attention(
        np.concatenate([q[0], q[0], q[1]]),
        memory[: far + 40],
        memory[: far + 40],
        cu_seqlens_q=rows[0],
        cu_seqlens_k=rows[1],
        window=window,
    )
    assert out[[0, 2]].tobytes() == expected[:, 0].tobytes()


def test_copies_of_blocks():
    rng = np.random.default_rng(2)
    cache = sparse_cache(np.float32, "nhd")
    first, last = 3, NUM_BLOCKS - 2
    cache[last] = block = rng.standard_normal((BLOCK, HEADS, DIM), np.float32)
    other = np.zeros((4, BLOCK, HEADS, DIM), np.float32)
    quire.swap_blocks(cache, other, np.array([[last, 1]], np.int32))
    assert np.array_equal(other[1], block)
    quire.swap_blocks(other, cache, np.array([[1, last - 1]], np.int32))
    assert np.array_equal(cache[last - 1], block)
    quire.copy_blocks(cache, sparse_cache(np.float32, "hnd"), np.array([[last, first]], np.int32))
    assert np.array_equal(cache[first], block)
