# SPDX-License-Identifier: Apache-2.0
"""Problems over quantised caches: codes and scales, and what they stand for in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np
from cases import DTYPES, MIXED, Case, Problem, random_cases
from device import DEVICE

KV_DTYPES = {"float8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn)}
if DEVICE == "cpu":
    KV_DTYPES |= {"float8_e5m2": np.dtype(ml_dtypes.float8_e5m2), "int8": np.dtype(np.int8)}
LARGEST = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
GRANULARITIES = ("tensor", "head", "token")


def quantise(x: np.ndarray, kv_dtype: str) -> np.ndarray:
    """float32 values, divided by their scales, as codes: bounded, to nearest even."""
    bounded = np.clip(x, -LARGEST[kv_dtype], LARGEST[kv_dtype])
    if kv_dtype == "int8":
        return np.rint(np.nan_to_num(bounded)).astype(np.int8)
    return bounded.astype(KV_DTYPES[kv_dtype])


def poison_codes(kv_dtype: str) -> list[np.ndarray]:
    """Codes that must not be read: NaN and infinity where there are any."""
    bits = {"float8_e4m3": (0x7F, 0xFF, 0x7E), "float8_e5m2": (0x7E, 0x7C, 0xFC)}
    return [
        np.array(code, np.uint8).view(KV_DTYPES[kv_dtype])
        for code in bits.get(kv_dtype, (0x7F, 0x80, 0x00))
    ]


def poisoned_cache(case: Case, num_blocks: int, dim: int, code: np.ndarray) -> np.ndarray:
    """A view [num_blocks, block_size, num_kv_heads, dim] of the case's memory layout."""
    n, b, h = num_blocks, case.block_size, case.num_kv_heads
    if case.cache == "nhd":
        return np.full((n, b, h, dim), code)
    if case.cache == "hnd":
        return np.full((n, h, b, dim), code).transpose(0, 2, 1, 3)
    return np.full((n, b, h, dim + 3), code)[..., 2 : dim + 2]  # odd strides and addresses


def poisoned_scales(case: Case, num_blocks: int, value: float) -> np.ndarray:
    """A view [num_blocks, block_size, num_kv_heads], likewise."""
    n, b, h = num_blocks, case.block_size, case.num_kv_heads
    if case.cache == "nhd":
        return np.full((n, b, h), value, np.float32)
    if case.cache == "hnd":
        return np.full((n, h, b), value, np.float32).transpose(0, 2, 1)
    return np.full((n, b + 1, 2 * h), value, np.float32)[:, 1:, ::2]


@dataclass
class QuantisedProblem(Problem):
    """`ks` and `vs` hold what the codes stand for; `codes` and `rows_of_scales` are a sequence's
    own, [K, V]; `scales` are the keyword arguments of the call that paged() last laid out."""

    kv_dtype: str = "int8"
    granularity: str = "tensor"
    codes: list = field(default_factory=list)
    rows_of_scales: list = field(default_factory=list)
    scales: dict = field(default_factory=dict)

    @classmethod
    def quantised(cls, case: Case, kv_dtype: str, granularity: str) -> QuantisedProblem:
        plain = Problem.make(case)
        problem = cls(**vars(plain), kv_dtype=kv_dtype, granularity=granularity)
        rng = np.random.default_rng(case.seed + 77)
        shared = [rng.uniform(2.5, 5, case.num_kv_heads) / LARGEST[kv_dtype] for _ in "kv"]
        for b in range(len(case.batch)):
            pair = []
            for side, rows in enumerate((plain.ks[b], plain.vs[b])):
                values = rows.astype(np.float32)
                scale = problem._scale_of(values, shared[side])
                codes = quantise(values / scale[..., None], kv_dtype)
                pair.append((codes, scale))
            problem.codes.append([codes for codes, _ in pair])
            problem.rows_of_scales.append([scale for _, scale in pair])
            exact = [codes.astype(np.float64) * scale[..., None] for codes, scale in pair]
            problem.ks[b], problem.vs[b] = exact
        if granularity == "tensor":
            problem.scales = {
                name: float(np.float32(shared[side][0])) for side, name in enumerate(NAMES)
            }
        elif granularity == "head":
            problem.scales = {
                name: np.repeat(shared[side], 2).astype(np.float32)[::2]
                for side, name in enumerate(NAMES)
            }
        return problem

    def _scale_of(self, values: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """float32 [tokens, num_kv_heads]."""
        if self.granularity == "token":
            largest = abs(values).max(axis=2, initial=0) / LARGEST[self.kv_dtype]
            return largest.astype(np.float32)
        own = shared if self.granularity == "head" else shared[:1]
        return np.broadcast_to(own.astype(np.float32), values.shape[:2])

    def paged(self, code: np.ndarray | None = None, scale: float = np.nan) -> tuple:
        """k_cache, v_cache, block_table, seq_lens; `code` and `scale` are in all that is unused."""
        case, code = self.case, poison_codes(self.kv_dtype)[0] if code is None else code
        rng = np.random.default_rng(case.seed * 7919 + 1)
        counts = [-(-s // case.block_size) for _, s in case.batch]
        num_blocks = sum(counts) + 3
        dims = (case.head_dim, case.head_dim_v)
        caches = [poisoned_cache(case, num_blocks, dim, code) for dim in dims]
        arrays = [poisoned_scales(case, num_blocks, scale) for _ in "kv"]
        ids = iter(rng.permutation(num_blocks))
        table = np.full((len(case.batch), max(counts, default=0) + 2), -7, np.int32)
        for b in range(len(case.batch)):
            for i in range(counts[b]):
                table[b, i] = block = next(ids)
                rows = slice(i * case.block_size, (i + 1) * case.block_size)
                for side in range(2):
                    codes = self.codes[b][side][rows]
                    caches[side][block, : len(codes)] = codes
                    arrays[side][block, : len(codes)] = self.rows_of_scales[b][side][rows]
        if self.granularity == "token":
            self.scales = dict(zip(NAMES, arrays, strict=True))
        return (*caches, table, np.array([s for _, s in case.batch], np.int32))


NAMES = ("k_scale", "v_scale")


def quantised_cases() -> list[tuple[Case, str, str]]:
    """Case, kv_dtype, granularity: one axis at a time around a decode and a mixed batch, then
    random combinations."""
    cases = []
    decode = Case(batch=tuple((1, s) for s in (1, 17, 511, 513, 1100)))
    mixed = Case(batch=MIXED)
    for kv_dtype in KV_DTYPES:
        for granularity in GRANULARITIES:
            for dtype in DTYPES:
                for base in (decode, mixed):
                    cases.append((replace(base, dtype=dtype), kv_dtype, granularity))
        for base in (decode, mixed):
            changed = [replace(base, cache="hnd"), replace(base, cache="pool", block_size=5)]
            changed += [replace(base, head_dim=d, head_dim_v=d) for d in (1, 7, 24, 40, 128)]
            changed += [
                replace(base, head_dim=192, head_dim_v=72),
                replace(base, num_heads=16),
                replace(base, window=(100, -1), softcap=5.0, alibi=True, sinks=True),
                replace(base, mask="tree"),
            ]
            cases += [
                (case, kv_dtype, GRANULARITIES[(i + (base is mixed)) % 3])
                for i, case in enumerate(changed)
            ]
    names = [(kv_dtype, granularity) for kv_dtype in KV_DTYPES for granularity in GRANULARITIES]
    drawn = [case for case in random_cases(120, seed=8) if case.layout == "paged"]
    return cases + [(case, *names[i % len(names)]) for i, case in enumerate(drawn)]
