# SPDX-License-Identifier: Apache-2.0
"""The grid: what one attention call is made of, and the list of calls that every backend must
pass. Everything that must not be read is NaN, and table entries beyond use are garbage."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
from device import DTYPES
from oracle import Options, attend, attend_naively

GARBAGE = (-1, 2**31 - 1, -(2**31), 10**6)


@dataclass(frozen=True)
class Case:
    layout: str = "paged"  # dense, ragged, paged
    dtype: str = next(iter(DTYPES))
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    block_size: int = 16
    # nhd, hnd, pool (K and V of all heads interleaved in one allocation), latent (V is the first
    # head_dim_v columns of K)
    cache: str = "nhd"
    batch: tuple[tuple[int, int], ...] = ((1, 40),)  # (q_len, seq_len)
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    mask: str = ""  # "", full, tree
    seed: int = 0

    def __str__(self) -> str:
        lengths = ",".join(f"{q}x{s}" for q, s in self.batch[:3]) + ("+" * (len(self.batch) > 3))
        flags = [name for name in ("causal", "alibi", "sinks") if getattr(self, name)]
        flags += [f"cap{self.softcap:g}"] * bool(self.softcap) + [self.mask] * bool(self.mask)
        flags += [f"win{self.window[0]}_{self.window[1]}"] * (self.window != (-1, -1))
        kv = f"-b{self.block_size}{self.cache}" if self.layout == "paged" else ""
        dims = f"h{self.num_heads}.{self.num_kv_heads}-d{self.head_dim}.{self.head_dim_v}"
        return "-".join([f"{self.layout}{kv}", self.dtype, dims, lengths, *flags])


@dataclass
class Problem:
    """A case with data: per sequence for the oracle, and as one call for the library."""

    case: Case
    qs: list[np.ndarray]
    ks: list[np.ndarray]
    vs: list[np.ndarray]
    masks: list[np.ndarray | None]
    options: Options
    extra: dict = field(default_factory=dict)  # keyword arguments of the call

    @classmethod
    def make(cls, case: Case) -> Problem:
        rng = np.random.default_rng(case.seed)
        dtype = DTYPES[case.dtype]

        def normal(*shape):
            return rng.standard_normal(shape, np.float32).astype(dtype)

        qs = [normal(q, case.num_heads, case.head_dim) for q, _ in case.batch]
        ks = [normal(s, case.num_kv_heads, case.head_dim) for _, s in case.batch]
        vs = [normal(s, case.num_kv_heads, case.head_dim_v) for _, s in case.batch]
        if case.cache == "latent":
            vs = [k[..., : case.head_dim_v] for k in ks]
        options = Options(
            causal=case.causal,
            window=case.window,
            softcap=case.softcap,
            alibi_slopes=rng.uniform(0.01, 0.5, case.num_heads).astype(np.float32)
            if case.alibi
            else None,
            sinks=rng.standard_normal(case.num_heads).astype(np.float32) if case.sinks else None,
        )
        extra = {
            "causal": case.causal,
            "window": case.window,
            "softcap": case.softcap,
            "alibi_slopes": options.alibi_slopes,
            "sinks": options.sinks,
        }
        masks: list[np.ndarray | None] = [None] * len(case.batch)
        if case.mask:
            masks, extra["mask"] = _make_masks(case, rng)
            extra["mask_kind"] = case.mask
        return cls(case, qs, ks, vs, masks, options, extra)

    def exact(self) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = zip(self.qs, self.ks, self.vs, self.masks, strict=True)
        return [attend(q, k, v, self.options, mask) for q, k, v, mask in rows]

    def naive(self) -> list[np.ndarray]:
        rows = zip(self.qs, self.ks, self.vs, self.masks, strict=True)
        return [attend_naively(q, k, v, self.options, mask) for q, k, v, mask in rows]

    def paged(self) -> tuple:
        """k_cache, v_cache, block_table, seq_lens: used slots hold data, all others NaN."""
        case, rng = self.case, np.random.default_rng(case_seed(self.case))
        counts = [-(-s // case.block_size) for _, s in case.batch]
        num_blocks = sum(counts) + 3
        k_cache, v_cache = poisoned_caches(case, num_blocks)
        ids = iter(rng.permutation(num_blocks))
        table = rng.choice(GARBAGE, (len(case.batch), max(counts, default=0) + 2)).astype(np.int32)
        for b, (k, v) in enumerate(zip(self.ks, self.vs, strict=True)):
            for i in range(counts[b]):
                table[b, i] = block = next(ids)
                rows = slice(i * case.block_size, (i + 1) * case.block_size)
                k_cache[block, : len(k[rows])] = k[rows]
                v_cache[block, : len(v[rows])] = v[rows]
        seq_lens = np.array([s for _, s in case.batch], np.int32)
        return k_cache, v_cache, table, seq_lens

    def cu_seqlens_q(self) -> np.ndarray:
        return np.cumsum([0, *(q for q, _ in self.case.batch)], dtype=np.int32)

    def cu_seqlens_k(self) -> np.ndarray:
        return np.cumsum([0, *(s for _, s in self.case.batch)], dtype=np.int32)


def case_seed(case: Case) -> int:
    return case.seed * 7919 + 1


def poisoned_caches(case: Case, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """All NaN, as views [num_blocks, block_size, num_kv_heads, dim] of the case's memory layout."""
    n, b, h, d, dv = (
        num_blocks,
        case.block_size,
        case.num_kv_heads,
        case.head_dim,
        case.head_dim_v,
    )
    nan = np.array(np.nan, DTYPES[case.dtype])
    if case.cache == "nhd":
        return np.full((n, b, h, d), nan), np.full((n, b, h, dv), nan)
    if case.cache == "hnd":
        k, v = np.full((n, h, b, d), nan), np.full((n, h, b, dv), nan)
        return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if case.cache == "latent":
        k = np.full((n, b, h, d), nan)
        return k, k[..., :dv]
    pool = np.full((n, b, h, d + dv + 3), nan)  # odd strides
    return pool[..., 1 : d + 1], pool[..., d + 2 : d + dv + 2]


def _make_masks(case: Case, rng) -> tuple[list, np.ndarray]:
    """bool [q_len, seq_len] a sequence, and the packed bits of all rows."""
    masks, rows = [], []
    width = max((q if case.mask == "tree" else s for q, s in case.batch), default=0)
    num_bytes = -(-width // 8) + 1
    for q_len, seq_len in case.batch:
        bits = rng.random((q_len, q_len if case.mask == "tree" else seq_len)) < 0.6
        full = np.ones((q_len, seq_len), bool)
        if case.mask == "full":
            full = bits
        else:  # bit j is key seq_len - q_len + j; there may be fewer keys than rows
            first = max(0, q_len - seq_len)
            full[:, max(0, seq_len - q_len) :] = bits[:, first:]
        masks.append(full)
        packed = np.packbits(bits, axis=1, bitorder="little")
        padding = rng.integers(0, 256, (q_len, num_bytes - packed.shape[1]))
        rows.append(np.concatenate([packed, padding.astype(np.uint8)], axis=1))
    stacked = np.concatenate(rows) if rows else np.zeros((0, num_bytes), np.uint8)
    return masks, stacked.reshape(
        len(case.batch), -1, num_bytes
    ) if case.layout == "dense" else stacked


MIXED = ((1, 213), (7, 7), (0, 5), (1, 1), (33, 600), (1, 1537), (5, 0), (9, 4))


def sweeps() -> list[Case]:
    """One axis at a time around two bases: a decode batch and a mixed batch."""
    cases = []
    for dtype in DTYPES:
        decode = Case(dtype=dtype, batch=tuple((1, s) for s in (1, 16, 17, 511, 512, 513, 1100)))
        mixed = Case(dtype=dtype, batch=MIXED)
        cases += [decode, mixed]
        for base in (decode, mixed):
            cases += [replace(base, cache=cache) for cache in ("hnd", "pool")]
            cases += [
                replace(base, num_heads=h * g, num_kv_heads=h) for h, g in ((1, 1), (1, 3), (2, 8))
            ]
            cases += [replace(base, block_size=b) for b in (1, 5, 128, 2000)]
            cases += [replace(base, window=w) for w in ((16, 0), (100, -1), (0, 0), (600, 5))]
            cases += [replace(base, head_dim=d, head_dim_v=d) for d in (1, 40, 72, 96, 128, 256)]
            cases += [
                replace(base, head_dim=192, head_dim_v=128),
                replace(base, softcap=5.0),
                replace(base, alibi=True),
                replace(base, sinks=True),
                replace(base, mask="full", causal=False),
                replace(base, mask="tree"),
                replace(base, causal=False),
                replace(base, softcap=30.0, alibi=True, sinks=True, mask="full", window=(300, 3)),
            ]
        for causal in (True, False):
            for shape in ((2, 128), (64, 200), (113, 113), (130, 70), (1, 700), (257, 513)):
                cases.append(Case("dense", dtype, batch=(shape,) * 2, causal=causal))
            cases.append(Case("ragged", dtype, batch=MIXED, causal=causal))
        for d in (200, 256):  # of more rows than MIXED has
            long = Case(dtype=dtype, head_dim=d, head_dim_v=d, batch=((90, 700), (1, 90), (70, 70)))
            cases += [long, replace(long, softcap=30.0, alibi=True, sinks=True, window=(300, 3))]
        cases.append(Case("dense", dtype, batch=((40, 40),) * 2, mask="full", alibi=True))
    return cases


def latent_cases() -> list[Case]:
    """Latent attention as it is decoded: every query head sees one row of 512 + 64 columns, whose
    first 512 are also the value; one token at a time, or a few drafted ones."""
    cases = []
    for dtype in DTYPES:
        base = Case(
            dtype=dtype, num_heads=16, num_kv_heads=1, head_dim=576, head_dim_v=512, cache="latent"
        )
        one = replace(base, batch=tuple((1, s) for s in (0, 1, 17, 513, 1100)))
        drafts = replace(base, batch=((2, 37), (4, 600), (3, 3), (0, 9), (4, 2)))
        for block_size in (1, 16, 64):
            cases += [replace(case, block_size=block_size) for case in (one, drafts)]
            for num_heads in (1, 128):
                cases += [
                    replace(base, block_size=block_size, num_heads=num_heads, batch=batch)
                    for batch in (((1, 70), (1, 530)), ((3, 21), (2, 65)))
                ]
        cases += [
            replace(drafts, mask="tree"),
            replace(drafts, window=(100, 0), softcap=5.0, sinks=True),
            replace(one, num_heads=40, alibi=True, causal=False),
            replace(one, num_heads=64),
            replace(drafts, num_heads=64, window=(100, 0), softcap=5.0, sinks=True),
            replace(drafts, num_heads=128, mask="tree"),
            replace(base, layout="ragged", batch=((5, 5), (1, 90), (70, 70))),
            replace(base, layout="dense", num_heads=3, batch=((4, 33),) * 2),
        ]
    return cases


def random_cases(count: int, seed: int = 20261121) -> list[Case]:
    """Combinations nobody thought of, always the same ones."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 4, 7))
        dim = rng.choice((8, 16, 24, 32, 59, 64, 80, 111, 128, 160, 224))
        layout = rng.choice(("dense", "ragged", "paged", "paged"))
        batch = tuple(
            (rng.choice((0, 1, 1, 2, 5, 17, 96)), rng.choice((0, 1, 15, 63, 256, 530, 1030)))
            for _ in range(rng.randrange(5))
        )
        if layout == "dense":
            batch = (batch or ((3, 40),))[:1] * rng.randrange(1, 4)
        cases.append(
            Case(
                layout,
                rng.choice(list(DTYPES)),
                kv_heads * group,
                kv_heads,
                dim,
                rng.choice((dim, dim, 40)),
                rng.choice((1, 3, 16, 32, 100)),
                rng.choice(("nhd", "hnd", "pool")),
                batch,
                rng.random() < 0.6,
                rng.choice(((-1, -1), (-1, -1), (50, 0), (7, 7), (-1, 3))),
                rng.choice((0.0, 0.0, 15.0)),
                rng.random() < 0.3,
                rng.random() < 0.3,
                rng.choice(("", "", "full", "tree")),
                i,
            )
        )
    return cases
