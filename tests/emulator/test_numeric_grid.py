# SPDX-License-Identifier: Apache-2.0
"""The grid of tests/numeric over the CUDA attention kernels, run on the emulator."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "numeric"))

from cases import DTYPES, Case, Problem, random_cases, sweeps  # noqa: E402
from tolerance import check_lse, check_out  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build-dev/tests/emulator/libquire_emulator_grid.so"

CASES = [
    case
    for case in sweeps() + random_cases(150)
    if case.dtype != "float32" and max(case.head_dim, case.head_dim_v) <= 256
]
ELEMENT_TYPES = {"float16": 1, "bfloat16": 2}

POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Scale(ctypes.Structure):
    """KvScale of quire/kernel_params.h."""

    _fields_ = [
        ("values", POINTER),
        ("strides", LONG * 3),  # block, row, head
        ("value", FLOAT),
        ("is_per_token", ctypes.c_bool),
    ]


class Params(ctypes.Structure):
    """AttentionParams of quire/kernel_params.h."""

    _fields_ = [
        *((name, INT) for name in ("num_heads", "num_kv_heads", "head_dim", "head_dim_v")),
        ("dtype", ctypes.c_uint8),
        ("kv_dtype", ctypes.c_uint8),
        ("scale", FLOAT),
        ("softcap", FLOAT),
        ("window_left", INT),
        ("window_right", INT),
        ("sequences", POINTER),
        ("block_table", POINTER),
        ("block_table_stride", LONG),
        ("block_size", INT),
        *((name, POINTER) for name in ("q", "k", "v", "out", "lse")),
        ("q_strides", LONG * 3),  # sequence, row, head
        ("k_strides", LONG * 4),  # sequence, block, row, head
        ("v_strides", LONG * 4),
        ("out_strides", LONG * 3),
        ("lse_strides", LONG * 3),  # sequence, row, head
        *((name, POINTER) for name in ("alibi_slopes", "sinks", "mask")),
        ("mask_strides", LONG * 2),  # sequence, row
        ("mask_is_tree", ctypes.c_bool),
        ("k_scale", Scale),
        ("v_scale", Scale),
    ]


class Call(ctypes.Structure):
    """Call of grid_backend.cpp."""

    _fields_ = [
        ("params", Params),
        *((name, POINTER) for name in ("seq_lens", "cu_seqlens_q", "cu_seqlens_k", "block_table")),
        *((name, INT) for name in ("batch_size", "max_blocks", "dense_q", "dense_k")),
        *((name, INT) for name in ("is_aligned", "use_decode", "parallelism", "seed")),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """Built by the first test: its kernels take a minute."""
    for command in (
        ["cmake", "--preset", "dev"],
        ["cmake", "--build", "--preset", "dev", "--target", "quire_emulator_grid"],
    ):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    loaded = ctypes.CDLL(str(LIBRARY))
    loaded.quire_emulator_attention.restype = ctypes.c_char_p
    assert loaded.quire_emulator_call_bytes() == ctypes.sizeof(Call), "Call has changed"
    return loaded


def strides(array: np.ndarray, dims: int) -> list[int]:
    """Of the outer `dims` dimensions counted from the last but one, in elements; 0 where none."""
    own = [stride // array.itemsize for stride in array.strides[:-1]]
    return [0] * (dims - len(own)) + own


def pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Tensors:
    """What one call reads and writes; kept alive by this object."""

    def __init__(self, problem: Problem):
        case, dtype = problem.case, DTYPES[problem.case.dtype]
        self.paged = case.layout == "paged"
        self.cu_q, self.cu_k = problem.cu_seqlens_q(), problem.cu_seqlens_k()
        self.table = self.seq_lens = None
        self.q = self.rows(problem.qs, (case.num_heads, case.head_dim), dtype)
        if self.paged:
            self.k, self.v, self.table, self.seq_lens = problem.paged()
        else:
            self.k = self.rows(problem.ks, (case.num_kv_heads, case.head_dim), dtype)
            self.v = self.rows(problem.vs, (case.num_kv_heads, case.head_dim_v), dtype)
        self.out = np.full((*self.q.shape[:2], case.head_dim_v), np.nan, dtype)
        self.lse = np.full((case.num_heads, len(self.q)), np.nan, np.float32)
        self.alibi = problem.options.alibi_slopes
        self.sinks = problem.options.sinks
        mask = problem.extra.get("mask")
        self.mask = None if mask is None else np.ascontiguousarray(mask).reshape(-1, mask.shape[-1])

    @staticmethod
    def rows(arrays: list, tail: tuple, dtype) -> np.ndarray:
        return np.concatenate([np.zeros((0, *tail), dtype), *arrays])

    def is_aligned(self) -> bool:
        tensors = (self.q, self.k, self.v, self.out)
        return all(
            t.ctypes.data % 16 == 0 and all(s % 16 == 0 for s in t.strides[:-1]) for t in tensors
        )


def make_call(problem: Problem, t: Tensors, use_decode: bool) -> Call:
    """Dense batches are given as the ragged ones that they are."""
    case = problem.case
    params = Params(
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        head_dim_v=case.head_dim_v,
        dtype=ELEMENT_TYPES[case.dtype],
        kv_dtype=ELEMENT_TYPES[case.dtype],
        scale=1 / np.sqrt(case.head_dim),
        softcap=case.softcap,
        window_left=case.window[0],
        window_right=0 if case.causal else case.window[1],
        block_size=case.block_size if t.paged else 0,
        q=pointer(t.q),
        k=pointer(t.k),
        v=pointer(t.v),
        out=pointer(t.out),
        lse=pointer(t.lse),
        alibi_slopes=pointer(t.alibi),
        sinks=pointer(t.sinks),
        mask=pointer(t.mask),
        mask_is_tree=case.mask == "tree",
    )
    params.q_strides[:] = strides(t.q, 3)
    params.out_strides[:] = strides(t.out, 3)
    params.lse_strides[:] = [0, 1, t.lse.shape[1]]
    params.mask_strides[:] = [0, 0 if t.mask is None else t.mask.shape[1]]
    for own, array in ((params.k_strides, t.k), (params.v_strides, t.v)):
        own[:] = strides(array, 4) if t.paged else [0, 0, *strides(array, 2)]
    return Call(
        params=params,
        seq_lens=pointer(t.seq_lens),
        cu_seqlens_q=pointer(t.cu_q),
        cu_seqlens_k=None if t.paged else pointer(t.cu_k),
        block_table=pointer(t.table),
        batch_size=len(case.batch),
        max_blocks=t.table.shape[1] if t.paged else 0,
        dense_q=-1,
        dense_k=-1,
        is_aligned=t.is_aligned(),
        use_decode=use_decode,
        parallelism=1 + 3 * (case.seed % 2),
        seed=case.seed + 1,
    )


@pytest.mark.parametrize("kernel", ["prefill", "decode"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_oracle(case: Case, kernel: str):
    problem = Problem.make(case)
    t = Tensors(problem)
    error = library().quire_emulator_attention(
        ctypes.byref(make_call(problem, t, kernel == "decode"))
    )
    assert error is None, error.decode()
    exact, naive = problem.exact(), problem.naive()
    split = any(seq_len > 512 for _, seq_len in case.batch)
    flat = [np.concatenate([np.zeros(0), *(np.ravel(x) for x in xs)]) for xs in (
        [out for out, _ in exact], [x.astype(np.float64) for x in naive])]  # fmt: skip
    check_out(t.out.astype(np.float64).ravel(), *flat, factor=3.0 if split else 2.0)
    for (_, exact_lse), a, b in zip(exact, t.cu_q, t.cu_q[1:], strict=False):
        check_lse(t.lse[:, a:b], exact_lse, case.dtype)
