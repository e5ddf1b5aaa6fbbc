# SPDX-License-Identifier: Apache-2.0
"""Attention over quantised caches: the oracle on dequantised values, and the edge contract."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import Case
from device import DEVICE, quire
from quantised import (
    GRANULARITIES,
    KV_DTYPES,
    QuantisedProblem,
    poison_codes,
    quantised_cases,
)
from test_attention import concatenate, flat
from test_edge_contract import RAGGED, bits, restore_threads  # noqa: F401
from tolerance import check_lse, check_out

CASES = quantised_cases()
BOTH = pytest.mark.parametrize("granularity", GRANULARITIES)
KV = pytest.mark.parametrize("kv_dtype", KV_DTYPES)


def compute(problem: QuantisedProblem, order: list[int] | None = None, **poison) -> list:
    """(out, lse) of each sequence in `order`, from one call over just those."""
    case = problem.case
    order = list(range(len(case.batch))) if order is None else order
    k_cache, v_cache, table, seq_lens = problem.paged(**poison)
    shape = (0, case.num_heads, case.head_dim)
    q = concatenate([problem.qs[b] for b in order], shape, case.dtype)
    cu = np.cumsum([0, *(len(problem.qs[b]) for b in order)], dtype=np.int32)
    table = np.ascontiguousarray(table[order])
    out, lse = quire.paged_attention(
        q, k_cache, v_cache, table, seq_lens[order],
        cu_seqlens_q=cu, return_lse=True, **problem.extra, **problem.scales,
    )  # fmt: skip
    return [(out[a:b], lse[:, a:b]) for a, b in zip(cu, cu[1:], strict=False)]


def all_bits(results: list) -> list[tuple[bytes, bytes]]:
    return [(bits(out), bits(lse)) for out, lse in results]


@pytest.mark.parametrize(("case", "kv_dtype", "granularity"), CASES, ids=str)
def test_agrees_with_the_oracle(case: Case, kv_dtype: str, granularity: str):
    problem = QuantisedProblem.quantised(case, kv_dtype, granularity)
    results = compute(problem)
    exact = problem.exact()
    out = [out for out, _ in results]
    check_out(flat(out), flat(x for x, _ in exact), flat(problem.naive()), factor=3.0)
    for (_, lse), (_, exact_lse) in zip(results, exact, strict=True):
        check_lse(lse, exact_lse, case.dtype)


@KV
@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("dim", [1, 8, 24, 32, 200])
def test_every_code_is_what_it_stands_for(kv_dtype, q_len, dim):
    """Of one key only, lse is its logit and out its value: code times scale, exactly."""
    codes = np.arange(256, dtype=np.uint8).view(KV_DTYPES[kv_dtype])
    values = codes.astype(np.float32)
    cache = np.broadcast_to(codes[None, None, :, None], (1, 1, 256, dim)).copy()
    q = np.zeros((q_len, 256, dim), np.float32 if DEVICE == "cpu" else np.float16)
    q[..., -1] = 1
    k_scale, v_scale = np.full(256, 0.25, np.float32), np.full((1, 1, 256), 0.5, np.float32)
    with np.errstate(invalid="ignore"):
        logits = values * np.float32(0.25)
    out, lse = quire.paged_attention(
        q, cache, cache, np.array([[0]], np.int32), np.array([1], np.int32), scale=1.0,
        cu_seqlens_q=np.array([0, q_len], np.int32), causal=False, return_lse=True,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    finite = np.isfinite(values)
    bounds = {"rtol": 3e-7, "atol": 0} if DEVICE == "cpu" else {"rtol": 1e-6, "atol": 1e-6}
    assert np.allclose(lse[finite], logits[finite, None], **bounds)
    assert np.array_equal(
        out[:, finite], np.broadcast_to(values[finite, None] / 2, out[:, finite].shape)
    )
    assert not np.isfinite(lse[~finite]).any()
    assert not np.isfinite(out[:, ~finite]).any()
    assert np.isnan(out[:, np.isnan(values)]).all()


@KV
@BOTH
def test_same_sequence_same_bits(kv_dtype, granularity, restore_threads):  # noqa: F811
    case = Case(dtype="bfloat16", num_heads=8, batch=RAGGED, window=(700, 0))
    problem = QuantisedProblem.quantised(case, kv_dtype, granularity)
    quire.set_num_threads(2)
    everything = all_bits(compute(problem))
    for threads in (1, 2, 5):
        quire.set_num_threads(threads)
        assert all_bits(compute(problem)) == everything, f"{threads} threads"
        for b in range(len(RAGGED)):
            assert all_bits(compute(problem, [b])) == [everything[b]], f"{b} alone, {threads}"
    shuffled = np.random.default_rng(5).permutation(len(RAGGED)).tolist()
    for b, result in zip(shuffled, all_bits(compute(problem, shuffled)), strict=True):
        assert result == everything[b], f"sequence {b} changed with the order"


@KV
@BOTH
def test_layouts_agree_bit_for_bit(kv_dtype, granularity):
    base = Case(batch=((1, 700), (40, 300)), head_dim=72, head_dim_v=72)
    changed = [replace(base, cache="hnd"), replace(base, cache="pool", block_size=7)]
    expected = all_bits(compute(QuantisedProblem.quantised(base, kv_dtype, granularity)))
    for case in (*changed, replace(base, block_size=1)):
        problem = QuantisedProblem.quantised(case, kv_dtype, granularity)
        assert all_bits(compute(problem)) == expected


@KV
@BOTH
@pytest.mark.parametrize("q_len", [1, 40])
def test_garbage_beyond_use_changes_nothing(kv_dtype, granularity, q_len):
    case = Case(batch=((q_len, 45), (q_len, 48), (q_len, 530), (q_len, 0), (q_len, 3)))
    problem = QuantisedProblem.quantised(case, kv_dtype, granularity)
    results = [
        all_bits(compute(problem, code=code, scale=scale))
        for code in poison_codes(kv_dtype)
        for scale in (np.nan, np.inf, -1e30, 0.0)
    ]
    assert all(result == results[0] for result in results)


@pytest.mark.skipif(DEVICE != "cpu", reason="is about the CPU")
@KV
@BOTH
def test_plan_and_run_is_the_one_shot_call(kv_dtype, granularity):
    case = Case(dtype="float16", batch=((1, 700), (1, 33)))
    problem = QuantisedProblem.quantised(case, kv_dtype, granularity)
    attn = quire.Attention(
        num_heads=4, num_kv_heads=2, head_dim=64, dtype="float16", kv_dtype=kv_dtype
    )
    k_cache, v_cache, table, seq_lens = problem.paged()
    plan = attn.plan(table, seq_lens)
    assert plan.kv_bytes == (700 + 33) * 2 * 2 * 64
    q = np.concatenate(problem.qs)
    out = attn.run(plan, q, k_cache, v_cache, **problem.scales)
    expected = quire.paged_attention(q, k_cache, v_cache, table, seq_lens, **problem.scales)
    assert bits(out) == bits(expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="is about the CPU")
def test_capabilities_list_what_works():
    rows = {(r["isa"], r["dtype"], r["kv_dtype"]): r for r in quire.capabilities()}
    for isa in quire.supported_cpu_isas():
        for dtype in ("float32", "float16", "bfloat16"):
            for kv_dtype in KV_DTYPES:
                row = rows[isa, dtype, kv_dtype]
                assert row["available"] and "scales" in row["features"]
                assert "dense" not in row["features"]
    attn = quire.Attention(num_heads=4, num_kv_heads=2, head_dim=64, kv_dtype="int8")
    assert f"cpu.{quire.cpu_isa()}: chosen" in attn.explain()
    x = np.ones((1, 5, 2, 8), np.float32)
    with pytest.raises(NotImplementedError, match="int8 KV is implemented for paged caches only"):
        quire.attention(x, x.astype(np.int8), x.astype(np.int8))
