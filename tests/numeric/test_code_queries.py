# SPDX-License-Identifier: Apache-2.0
"""Queries of float8_e4m3 over caches of it: outputs are bfloat16. The CPU computes what it computes
with the same queries in bfloat16; the GPU rounds weights to float8_e4m3, too."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import Case
from device import DEVICE, quire
from quantised import GRANULARITIES, QuantisedProblem
from test_edge_contract import bits

CODE = ml_dtypes.float8_e4m3fn
BATCH = ((70, 333), (1, 700), (3, 3), (40, 45), (0, 5), (2, 0))
BOTH = pytest.mark.parametrize("granularity", GRANULARITIES)


def make_problem(granularity: str, **changes) -> QuantisedProblem:
    case = Case(
        **{"dtype": "bfloat16", "batch": BATCH, "head_dim": 128, "head_dim_v": 128} | changes
    )
    problem = QuantisedProblem.quantised(case, "float8_e4m3", granularity)
    problem.qs = [q.astype(CODE) for q in problem.qs]
    return problem


def compute(problem: QuantisedProblem, order: list[int], dtype: type = CODE, **options) -> list:
    """(out, lse) of each sequence in `order`, from one call over just those."""
    k_cache, v_cache, table, seq_lens = problem.paged()
    q = np.concatenate([problem.qs[b] for b in order]).astype(dtype)
    cu = np.cumsum([0, *(len(problem.qs[b]) for b in order)], dtype=np.int32)
    out, lse = quire.paged_attention(
        q, k_cache, v_cache, np.ascontiguousarray(table[order]), seq_lens[order], cu_seqlens_q=cu,
        out=np.full((*q.shape[:-1], v_cache.shape[-1]), np.nan, ml_dtypes.bfloat16),
        return_lse=True, **problem.scales, **{**problem.extra, **options},
    )  # fmt: skip
    return [(out[a:b], lse[:, a:b]) for a, b in zip(cu, cu[1:], strict=False)]


def check(problem: QuantisedProblem, **options) -> None:
    """A weight is rounded by at most 2^-4 of itself, and so is the sum of weighted values."""
    results = compute(problem, list(range(len(problem.qs))), **options)
    for (out, lse), (exact, exact_lse), v in zip(results, problem.exact(), problem.vs, strict=True):
        empty = np.isneginf(exact_lse)
        assert np.array_equal(np.isneginf(lse), empty)
        assert np.abs(np.where(empty, 0, lse) - np.where(empty, 0, exact_lse)).max(initial=0) < 1e-2
        error = np.abs(out.astype(np.float64) - exact)
        largest = np.abs(v).max(initial=0)
        assert error.max(initial=0) <= (2**-4 + 2**-8) * largest
        # Errors of many weights are of both signs: a few percent of the spread of the values.
        assert np.sqrt(np.square(error).mean()) <= 0.03 * largest if error.size else True


@BOTH
@pytest.mark.parametrize("cache", ["nhd", "hnd"])
def test_agrees_with_the_oracle(granularity, cache):
    check(make_problem(granularity, cache=cache))


SMALL = ((17, 150), (1, 530), (3, 3), (2, 0))


@pytest.mark.parametrize(
    ("granularity", "changes"),
    [
        ("tensor", {"softcap": 3.0}),
        ("head", {"alibi": True}),
        ("token", {"alibi": True, "sinks": True, "window": (100, 5), "causal": False}),
        ("tensor", {"mask": "full", "causal": False}),
        ("token", {"mask": "tree", "softcap": 5.0}),
        ("head", {"cache": "pool"}),
        ("token", {"head_dim": 83, "head_dim_v": 37, "num_heads": 6}),
        ("tensor", {"head_dim": 64, "head_dim_v": 64}),
        ("token", {"head_dim": 64, "head_dim_v": 64, "softcap": 5.0, "mask": "tree"}),
        ("head", {"head_dim": 40, "head_dim_v": 56, "num_heads": 6}),
    ],
    ids=str,
)
def test_every_option(granularity, changes):
    check(make_problem(granularity, batch=SMALL, **changes))


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_a_negative_scale(granularity):
    problem = make_problem(granularity, batch=SMALL)
    problem.options = replace(problem.options, scale=-0.1)
    check(problem, scale=-0.1)


@BOTH
@pytest.mark.parametrize("dim", [64, 128])
def test_a_row_depends_on_its_own_sequence_only(granularity, dim):
    batch = ((5, 1300), (1, 530), (80, 700))
    problem = make_problem(granularity, batch=batch, head_dim=dim, head_dim_v=dim)
    together = compute(problem, [0, 1, 2])
    for order in ([2, 0, 1], [1], [0]):
        for b, (out, lse) in zip(order, compute(problem, order), strict=True):
            assert bits(out) == bits(together[b][0])
            assert bits(lse) == bits(together[b][1])


@pytest.mark.skipif(DEVICE != "cpu", reason="is about the CPU")
@BOTH
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": (40, 0)}])
def test_on_the_cpu_they_are_floats(granularity, options):
    problem = make_problem(granularity, head_dim=72, head_dim_v=40)
    order = list(range(len(BATCH)))
    codes = compute(problem, order, **options)
    floats = compute(problem, order, ml_dtypes.bfloat16, **options)
    for (out, lse), (expected, expected_lse) in zip(codes, floats, strict=True):
        assert bits(out) == bits(expected)
        assert bits(lse) == bits(expected_lse)


@pytest.mark.skipif(DEVICE != "cpu", reason="is about the CPU")
def test_plan_and_run_makes_an_output_of_bfloat16():
    problem = make_problem("head", batch=((1, 33), (1, 700)))
    case = problem.case
    attn = quire.Attention(
        num_heads=case.num_heads, num_kv_heads=case.num_kv_heads, head_dim=128, dtype="float8_e4m3"
    )
    k_cache, v_cache, table, seq_lens = problem.paged()
    q = np.concatenate(problem.qs)
    out = attn.run(attn.plan(table, seq_lens), q, k_cache, v_cache, **problem.scales)
    assert out.dtype == ml_dtypes.bfloat16
    expected = quire.paged_attention(q, k_cache, v_cache, table, seq_lens, **problem.scales,
                                     out=np.empty_like(out))  # fmt: skip
    assert bits(out) == bits(expected)


def test_other_combinations_are_refused():
    q = np.ones((1, 2, 128), CODE)
    table, lens = np.array([[0]], np.int32), np.array([5], np.int32)
    out = np.zeros(q.shape, ml_dtypes.bfloat16)
    cache = np.ones((1, 16, 2, 128), ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match=r"for paged caches of float8_e4m3, got one of bfloat16"):
        quire.paged_attention(q, cache, cache, table, lens, out=out)
    with pytest.raises(ValueError, match=r"for paged caches of float8_e4m3, got no cache"):
        quire.attention(q[None], q[None], q[None], out=out[None])
    codes = cache.astype(CODE)
    with pytest.raises(ValueError, match=r"out: expected .* bfloat16.*, got .* float16"):
        quire.paged_attention(q, codes, codes, table, lens, out=out.astype(np.float16))
    assert not out.any()
