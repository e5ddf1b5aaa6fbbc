# SPDX-License-Identifier: Apache-2.0
"""append_kv, copy_blocks and swap_blocks on quantised caches, against ml_dtypes' rounding."""

from __future__ import annotations

import numpy as np
import pytest
from cases import DTYPES, Case
from device import DEVICE, quire
from quantised import (
    GRANULARITIES,
    KV_DTYPES,
    LARGEST,
    poison_codes,
    poisoned_cache,
    poisoned_scales,
    quantise,
)
from test_cache_ops import make_rope, rotated

KV = pytest.mark.parametrize("kv_dtype", KV_DTYPES)
SCALES = pytest.mark.parametrize("granularity", GRANULARITIES)


def codes_of(cache: np.ndarray) -> np.ndarray:
    return np.array(cache).view(np.uint8)


class Caches:
    """K and V of nine blocks, poisoned, with their scales, and what they must become."""

    def __init__(self, case: Case, kv_dtype: str, granularity: str):
        self.case, self.kv_dtype, self.granularity = case, kv_dtype, granularity
        code, heads = poison_codes(kv_dtype)[0], case.num_kv_heads
        self.caches = [poisoned_cache(case, 9, case.head_dim, code) for _ in "kv"]
        self.scales: list = [0.037, 0.5]
        if granularity == "head":
            self.scales = [np.linspace(0.01, 0.09, heads, dtype=np.float32) for _ in "kv"]
        if granularity == "token":
            self.scales = [poisoned_scales(case, 9, np.nan) for _ in "kv"]
        self.codes = [codes_of(cache) for cache in self.caches]
        self.numbers = [np.array(scale, np.float32) for scale in self.scales]

    def append(self, k, v, slots, rope=None) -> None:
        k_scale, v_scale = self.scales
        quire.append_kv(k, v, *self.caches, slots, rope=rope, k_scale=k_scale, v_scale=v_scale)

    def expect(self, side: int, slot: int, rows: np.ndarray) -> None:
        """rows float32 [num_kv_heads, dim] belong into a slot."""
        where = divmod(slot, self.case.block_size)
        scale = self.numbers[side]
        if self.granularity == "token":
            largest = np.nan_to_num(abs(rows), nan=0, posinf=np.finfo(np.float32).max).max(axis=1)
            own = (largest / np.float32(LARGEST[self.kv_dtype])).astype(np.float32)
            scale[where] = np.maximum(own, np.finfo(np.float32).tiny)
            scale = scale[where]
        with np.errstate(over="ignore", invalid="ignore"):
            divided = rows / (scale[:, None] if scale.ndim else scale)
        self.codes[side][where] = codes_of(quantise(divided, self.kv_dtype))

    def check(self) -> None:
        for side in range(2):
            assert np.array_equal(codes_of(self.caches[side]), self.codes[side])
            numbers = np.array(self.scales[side], np.float32)
            assert np.array_equal(numbers, self.numbers[side], equal_nan=True)


def odd_rows(rng, shape, dtype) -> np.ndarray:
    """Numbers of all magnitudes, ties, infinities; a row of zeros and one of tiny numbers."""
    x = rng.standard_normal(shape, np.float32) * np.exp2(rng.uniform(-20, 5, shape))
    x[0] = rng.integers(-30, 30, shape[1:]) / 16
    x[1, 0] = 0
    x[1, 1] = 1e-44
    x[-1, 0, -1] = np.inf
    x[-1, 1, 0] = -3e38
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(dtype)


@KV
@SCALES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", ["nhd", "hnd", "pool"])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (3, 7), (5, 130)])
def test_append_kv_quantises(kv_dtype, granularity, dtype, cache, block_size, head_dim):
    case = Case(cache=cache, block_size=block_size, head_dim=head_dim, head_dim_v=head_dim)
    rng = np.random.default_rng(1)
    caches = Caches(case, kv_dtype, granularity)
    slots = rng.permutation(9 * block_size)[:12].astype(np.int64)
    slots[[2, 5]] = -1
    k, v = (odd_rows(rng, (12, 2, head_dim), DTYPES[dtype]) for _ in "kv")
    for side, rows in enumerate((k, v)):
        for t in np.flatnonzero(slots >= 0):
            caches.expect(side, slots[t], rows[t].astype(np.float32))
    caches.append(k, v, slots)
    caches.check()


@KV
@SCALES
def test_append_kv_of_nan(kv_dtype, granularity):
    case = Case(block_size=2, head_dim=40, head_dim_v=40)
    caches = Caches(case, kv_dtype, granularity)
    dtype = np.float32 if DEVICE == "cpu" else np.float16
    k = np.random.default_rng(2).standard_normal((1, 2, 40)).astype(dtype)
    k[0, 0, 3] = k[0, 1, 39] = np.nan
    caches.append(k, np.full_like(k, np.nan), np.array([3]))
    written = [np.array(cache[1, 1], np.float32) for cache in caches.caches]
    if kv_dtype == "int8":
        assert (written[0][np.isnan(k[0])] == 0).all() and not written[1].any()
    else:
        assert np.array_equal(np.isnan(written[0]), np.isnan(k[0])) and np.isnan(written[1]).all()
    if granularity == "token":
        assert np.allclose(
            caches.scales[0][1, 1],
            np.nanmax(abs(k[0]), axis=1).astype(np.float32) / LARGEST[kv_dtype],
            rtol=1e-6,
        )
        assert np.isfinite(caches.scales[1][1, 1]).all()


@KV
@SCALES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 32), (11, 6)])
def test_append_kv_rotates_then_quantises(
    kv_dtype, granularity, dtype, interleaved, head_dim, rotary_dim
):
    """In float32, rounded once: half a step of the code, and the float32 arithmetic."""
    case = Case(head_dim=head_dim, head_dim_v=head_dim)
    rng = np.random.default_rng(3)
    caches = Caches(case, kv_dtype, granularity)
    k, v = (rng.standard_normal((20, 2, head_dim), np.float32).astype(DTYPES[dtype]) for _ in "kv")
    rope = make_rope(rng, 20, rotary_dim, interleaved)
    slots = rng.permutation(9 * 16)[:20].astype(np.int64)
    for t, slot in enumerate(slots):
        caches.expect(1, slot, v[t].astype(np.float32))
    caches.append(k, v, slots, rope)
    where = slots // 16, slots % 16
    codes = np.array(caches.caches[0][where])
    scale = np.array(caches.scales[0], np.float64)
    scale = scale[where][..., None] if granularity == "token" else scale[..., None]
    exact, bound = rotated(k.astype(np.float32), rope)
    exact, bound = exact / scale, bound / scale + abs(exact / scale) * 1e-6
    value = codes.astype(np.float64)
    clipped = np.clip(exact, -LARGEST[kv_dtype], LARGEST[kv_dtype])
    assert (abs(value - clipped) <= steps(codes, kv_dtype) / 2 + bound).all()
    assert np.array_equal(codes_of(caches.caches[1]), caches.codes[1])


def steps(codes: np.ndarray, kv_dtype: str) -> np.ndarray:
    """The larger of the distances from a code to its neighbours."""
    if kv_dtype == "int8":
        return np.ones(codes.shape)
    finite = np.arange(0, 0x7F if kv_dtype == "float8_e4m3" else 0x7C, dtype=np.uint8)
    values = finite.view(KV_DTYPES[kv_dtype]).astype(np.float64)
    distance = np.diff(values, append=values[-1])
    distance[-1] = distance[-2]
    return distance[np.searchsorted(values, abs(codes.astype(np.float64)))]


@pytest.mark.skipif(DEVICE != "cpu", reason="is about the CPU: float32, KVCache")
@KV
def test_what_was_appended_is_attended(kv_dtype):
    """Written a step at a time with a scale a token, read with those: close to the floats."""
    rng = np.random.default_rng(4)
    k, v = rng.standard_normal((2, 70, 2, 64)).astype(np.float32)
    cache = quire.KVCache(1, 5, 16, 2, 64, kv_dtype)
    scales = {name: np.full((5, 16, 2), np.nan, np.float32) for name in ("k_scale", "v_scale")}
    for begin in range(0, 70, 10):
        slots = np.arange(begin, begin + 10)
        rows = slice(begin, begin + 10)
        quire.append_kv(k[rows], v[rows], cache.k(0), cache.v(0), slots, **scales)
    q = rng.standard_normal((1, 8, 64)).astype(np.float32)
    table, seq_lens = np.arange(5, dtype=np.int32)[None], np.array([70], np.int32)
    out = quire.paged_attention(q, cache.k(0), cache.v(0), table, seq_lens, **scales)
    exact = quire.attention(q[None], k[None], v[None])[0]
    assert (
        abs(out - exact).max() < {"float8_e4m3": 0.05, "float8_e5m2": 0.1, "int8": 0.01}[kv_dtype]
    )


@KV
@pytest.mark.parametrize("cache", ["nhd", "hnd", "pool"])
def test_blocks_are_copied_with_their_scales(kv_dtype, cache):
    case = Case(cache=cache, block_size=5, head_dim=7, head_dim_v=7)
    caches = Caches(case, kv_dtype, "token")
    rng = np.random.default_rng(5)
    for array in (*caches.caches, *caches.scales):
        array[...] = rng.integers(-50, 50, array.shape).astype(array.dtype)
    before = [np.array(x) for x in (*caches.caches, *caches.scales)]
    pairs = np.array([[0, 3], [8, 1], [0, 5]], np.int32)
    quire.copy_blocks(*caches.caches, pairs)
    quire.copy_blocks(*(scale[..., None] for scale in caches.scales), pairs)
    for array, old in zip((*caches.caches, *caches.scales), before, strict=True):
        old[[3, 1, 5]] = old[[0, 8, 0]]
        assert np.array_equal(array.astype(np.float32), old.astype(np.float32))
    other = poisoned_cache(case, 4, 7, poison_codes(kv_dtype)[0])
    expected = codes_of(other)
    expected[[2, 0]] = codes_of(caches.caches[0])[[8, 1]]
    quire.swap_blocks(caches.caches[0], other, np.array([[8, 2], [1, 0]], np.int32))
    assert np.array_equal(codes_of(other), expected)
