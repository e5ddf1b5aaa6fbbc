# SPDX-License-Identifier: Apache-2.0
"""What `quire bench` measures: each case has data, quire's call, and sampled exact results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import quire
from quire._arrays import numpy_dtype

Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
_SAMPLES = 6  # rows of a result that are checked


@dataclass(frozen=True)
class Shape:
    """Heads of a case."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        """As tables show it: 32/8x128."""
        return f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}"


@dataclass
class Case:
    """One line of the table."""

    name: str
    dtype: str
    roof: str  # "float32", "bfloat16" (flop) or "memory" (bytes)
    work: float  # flop or bytes of one call
    run: Callable[[], Array]  # quire's call
    samples: list[tuple[tuple[int, ...], Array]]  # index into the result -> exact row

    def check(self, result: Array, who: str) -> None:
        """Raises AssertionError where a sampled row is not what it should be."""
        for index, exact in self.samples:
            error = float(np.abs(np.asarray(result[index], np.float64) - exact).max())
            bound = TOLERANCE[self.dtype] * max(1.0, float(np.abs(exact).max()))
            assert error <= bound, f"{self.name} {self.dtype}: {who} is off by {error} at {index}"


@dataclass
class Prefill(Case):
    """Dense causal attention of one sequence: q, k, v [1, length, heads, head_dim]."""

    tensors: tuple[Array, Array, Array]


@dataclass
class Backward(Prefill):
    """The gradients of the same; results are dq."""

    dout: Array


@dataclass
class Decode(Case):
    """One query row a sequence over a paged cache; see `paged_attention` for the shapes."""

    q: Array
    k_cache: Array
    v_cache: Array
    block_table: Array
    seq_lens: Array


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Normal numbers; large arrays repeat them, which no kernel notices."""
    size = int(np.prod(shape))
    part = rng.standard_normal(min(size, 1 << 20), np.float32).astype(numpy_dtype(dtype, "dtype"))
    return np.resize(part, shape)


def _row(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """One query over its keys in float64: its result, probabilities, and k in float64."""
    k64 = k.astype(np.float64)
    logits = k64 @ q.astype(np.float64) / np.sqrt(q.shape[-1])
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return p @ v.astype(np.float64), p, k64


def _sampled(rng: np.random.Generator, rows: int, shape: Shape) -> list[tuple[int, int, int]]:
    """(row, head, its kv head), the first and the last row among them."""
    picked = [0, rows - 1, *rng.integers(0, rows, _SAMPLES - 2)]
    heads = rng.integers(0, shape.num_heads, _SAMPLES)
    group = shape.num_heads // shape.num_kv_heads
    return [(int(r), int(h), int(h) // group) for r, h in zip(picked, heads, strict=True)]


def _dense(rng: np.random.Generator, shape: Shape, length: int, dtype: str) -> tuple[Array, ...]:
    kv = (1, length, shape.num_kv_heads, shape.head_dim)
    q = random(rng, (1, length, shape.num_heads, shape.head_dim), dtype)
    return q, random(rng, kv, dtype), random(rng, kv, dtype)


def _causal_pairs(length: int) -> float:
    return length * (length + 1) / 2


def prefill(shape: Shape, length: int, dtype: str) -> Prefill:
    """A prompt of `length` tokens."""
    rng = np.random.default_rng(0)
    q, k, v = _dense(rng, shape, length, dtype)
    out = np.empty_like(q)

    def run() -> Array:
        quire.attention(q, k, v, causal=True, out=out)
        return out

    samples: list[tuple[tuple[int, ...], Array]] = [
        ((0, i, h), _row(q[0, i, h], k[0, : i + 1, g], v[0, : i + 1, g])[0])
        for i, h, g in _sampled(rng, length, shape)
    ]
    return Prefill(
        f"causal prefill 1x{length} {shape}",
        dtype,
        "bfloat16" if dtype == "bfloat16" else "float32",
        4 * _causal_pairs(length) * shape.num_heads * shape.head_dim,
        run,
        samples,
        (q, k, v),
    )


def backward(shape: Shape, length: int, dtype: str) -> Backward:
    """The gradients of a prompt of `length` tokens: five products where forward has two."""
    rng = np.random.default_rng(0)
    q, k, v = _dense(rng, shape, length, dtype)
    dout = random(rng, q.shape, dtype)
    out, lse = quire.attention(q, k, v, causal=True, return_lse=True)
    samples: list[tuple[tuple[int, ...], Array]] = []
    for i, h, g in _sampled(rng, length, shape):
        result, p, keys = _row(q[0, i, h], k[0, : i + 1, g], v[0, : i + 1, g])
        above = dout[0, i, h].astype(np.float64)
        ds = p * (v[0, : i + 1, g].astype(np.float64) @ above - above @ result)
        samples.append(((0, i, h), ds @ keys / np.sqrt(shape.head_dim)))

    def run() -> Array:
        gradients = quire.attention_backward(dout, q, k, v, out, lse, causal=True)
        dq: Array = gradients[0]
        return dq

    return Backward(
        f"causal backward 1x{length} {shape}",
        dtype,
        "float32",
        10 * _causal_pairs(length) * shape.num_heads * shape.head_dim,
        run,
        samples,
        (q, k, v),
        dout,
    )


def _cache(
    rng: np.random.Generator,
    shape: Shape,
    num_blocks: int,
    block_size: int,
    layout: str,
    dtype: str,
) -> list[Array]:
    """K and V as [num_blocks, block_size, num_kv_heads, head_dim] views of the layout's memory."""
    heads, dim = shape.num_kv_heads, shape.head_dim
    if layout == "token-major":
        return [random(rng, (num_blocks, block_size, heads, dim), dtype) for _ in "kv"]
    pool = random(rng, (num_blocks, 2, heads, block_size, dim), dtype)  # as KVCache
    return [pool[:, i].transpose(0, 2, 1, 3) for i in range(2)]


def decode(
    shape: Shape, lengths: list[int], block_size: int, layout: str, dtype: str, name: str
) -> Decode:
    """One token each for sequences of these lengths, in blocks that lie in no order."""
    rng = np.random.default_rng(0)
    counts = [-(-n // block_size) for n in lengths]
    k_cache, v_cache = _cache(rng, shape, sum(counts), block_size, layout, dtype)
    ids = iter(rng.permutation(sum(counts)).tolist())
    table = np.full((len(lengths), max(counts)), -1, np.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = [next(ids) for _ in range(count)]
    seq_lens = np.array(lengths, np.int32)
    q = random(rng, (len(lengths), shape.num_heads, shape.head_dim), dtype)
    out = np.empty_like(q)

    def run() -> Array:
        quire.paged_attention(q, k_cache, v_cache, table, seq_lens, out=out)
        return out

    def rows_of(cache: Array, b: int, kv_head: int) -> Array:
        rows: Array = cache[table[b, : counts[b]], :, kv_head]
        return rows.reshape(-1, rows.shape[-1])[: lengths[b]]

    samples: list[tuple[tuple[int, ...], Array]] = [
        ((b, h), _row(q[b, h], rows_of(k_cache, b, g), rows_of(v_cache, b, g))[0])
        for b, h, g in _sampled(rng, len(lengths), shape)
    ]
    return Decode(
        f"paged decode {name} b{block_size} {layout}",
        dtype,
        "memory",
        2.0 * sum(lengths) * shape.num_kv_heads * shape.head_dim * q.dtype.itemsize,
        run,
        samples,
        q,
        k_cache,
        v_cache,
        table,
        seq_lens,
    )


def standard(quick: bool) -> list[Callable[[], Case]]:
    """The cases of the command, made one at a time: the largest take gigabytes."""
    llama, small = Shape(32, 8, 128), Shape(16, 16, 64)

    def ragged(batch: int) -> list[int]:  # 1k to 16k tokens
        return [int(n) for n in np.linspace(1024, 16384, batch)]

    def paged(lengths: list[int], block_size: int, layout: str, name: str) -> Callable[[], Case]:
        return lambda: decode(llama, lengths, block_size, layout, "bfloat16", name)

    dtypes = ("bfloat16", "float32", "float16")
    makers: list[Callable[[], Case]] = [
        lambda dtype=dtype: prefill(llama, 2048, dtype)  # type: ignore[misc]
        for dtype in dtypes
    ]
    layouts = ("head-major", "token-major")
    one, eight = ([16384], "1x16k"), (ragged(8), "8x1k-16k")
    if quick:
        return makers + [paged(one[0], 16, layout, one[1]) for layout in layouts]
    makers.append(lambda: prefill(small, 2048, "bfloat16"))
    makers.append(lambda: backward(llama, 2048, "float32"))
    for lengths, name in (one, eight, (ragged(32), "32x1k-16k")):
        makers += [paged(lengths, 16, layout, name) for layout in layouts]
    makers += [paged(eight[0], size, layout, eight[1]) for size in (1, 256) for layout in layouts]
    return makers
