# SPDX-License-Identifier: Apache-2.0
"""The one numeric suite: the whole grid against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
from cases import DTYPES, Case, Problem, latent_cases, random_cases, sweeps
from device import quire
from tolerance import check_lse, check_out

CASES = sweeps() + latent_cases() + random_cases(250)


def compute(problem: Problem) -> list[tuple[np.ndarray, np.ndarray]]:
    """(out, lse) a sequence, from one call over the whole batch."""
    case = problem.case
    if case.layout == "dense":
        q, k, v = (np.stack(x) for x in (problem.qs, problem.ks, problem.vs))
        out, lse = quire.attention(q, k, shared(case, k, v), return_lse=True, **problem.extra)
        return list(zip(out, lse, strict=True))
    q = concatenate(problem.qs, (0, case.num_heads, case.head_dim), case.dtype)
    cu = problem.cu_seqlens_q()
    if case.layout == "ragged":
        k = concatenate(problem.ks, (0, case.num_kv_heads, case.head_dim), case.dtype)
        v = concatenate(problem.vs, (0, case.num_kv_heads, case.head_dim_v), case.dtype)
        out, lse = quire.attention(
            q,
            k,
            shared(case, k, v),
            cu_seqlens_q=cu,
            cu_seqlens_k=problem.cu_seqlens_k(),
            return_lse=True,
            **problem.extra,
        )
    else:
        out, lse = quire.paged_attention(
            q, *problem.paged(), cu_seqlens_q=cu, return_lse=True, **problem.extra
        )
    return [(out[a:b], lse[:, a:b]) for a, b in zip(cu, cu[1:], strict=False)]


def shared(case: Case, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """v, of a latent case as the columns of k that it is."""
    return k[..., : case.head_dim_v] if case.cache == "latent" else v


def concatenate(arrays: list[np.ndarray], empty: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(empty, DTYPES[dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_oracle(case: Case):
    problem = Problem.make(case)
    results = compute(problem)
    assert len(results) == len(case.batch)
    exact = problem.exact()
    split = any(seq_len > 512 for _, seq_len in case.batch)
    check_out(
        flat(out for out, _ in results),
        flat(out for out, _ in exact),
        flat(problem.naive()),
        factor=3.0 if split else 2.0,
    )
    for (_, lse), (_, exact_lse) in zip(results, exact, strict=True):
        check_lse(lse, exact_lse, case.dtype)


def flat(arrays) -> np.ndarray:
    return np.concatenate(
        [np.zeros(0), *(np.asarray(x).astype(np.float64).ravel() for x in arrays)]
    )


def test_grid_covers_what_it_claims():
    """A grid that lost an axis would pass quietly."""
    for axis in ("layout", "dtype", "cache", "mask", "causal", "alibi", "sinks"):
        expected = {"layout": 3, "dtype": len(DTYPES), "cache": 4, "mask": 3}.get(axis, 2)
        assert len({getattr(case, axis) for case in CASES}) == expected, axis
    assert len({case.head_dim for case in CASES}) >= 10
    assert len({case.num_heads // case.num_kv_heads for case in CASES}) >= 6
