# SPDX-License-Identifier: Apache-2.0
"""The edge contract, clause by clause (poisoned memory is in the whole grid; here is the rest)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from cases import DTYPES, GARBAGE, Case, Problem
from device import DEVICE, quire
from test_attention import compute

DTYPE_NAMES = list(DTYPES)
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="is about the CPU")
RAGGED = ((1, 700), (1, 3), (40, 900), (0, 12), (1, 0), (7, 7), (1, 1300), (200, 200), (3, 520))


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def run_paged(problem: Problem, order: list[int]) -> list[tuple[bytes, bytes]]:
    """The bits of (out, lse) of each sequence in `order`, from one call over just those."""
    case = problem.case
    k_cache, v_cache, table, seq_lens = problem.paged()
    q = np.concatenate([problem.qs[b] for b in order])
    cu = np.cumsum([0, *(len(problem.qs[b]) for b in order)], dtype=np.int32)
    out, lse = quire.paged_attention(
        q,
        k_cache,
        v_cache,
        np.ascontiguousarray(table[order]),
        seq_lens[order],
        cu_seqlens_q=cu,
        return_lse=True,
        causal=case.causal,
        window=case.window,
    )
    return [(bits(out[a:b]), bits(lse[:, a:b])) for a, b in zip(cu, cu[1:], strict=False)]


@pytest.fixture
def restore_threads():
    before = quire.num_threads()
    yield
    quire.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("window", [(-1, -1), (130, 0)])
def test_same_sequence_same_bits(dtype, window, restore_threads):
    """Whatever else is in the batch, in whatever order, on any number of threads."""
    problem = Problem.make(Case(dtype=dtype, num_heads=8, batch=RAGGED, window=window))
    quire.set_num_threads(2)
    everything = run_paged(problem, list(range(len(RAGGED))))
    shuffled = np.random.default_rng(5).permutation(len(RAGGED)).tolist()
    for b, result in zip(shuffled, run_paged(problem, shuffled), strict=True):
        assert result == everything[b], f"sequence {b} changed with the order"
    for threads in (1, 2, 5, 16):
        quire.set_num_threads(threads)
        assert run_paged(problem, list(range(len(RAGGED)))) == everything, f"{threads} threads"
        for b in range(len(RAGGED)):
            assert run_paged(problem, [b]) == [everything[b]], f"sequence {b} alone, {threads}"


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_layouts_agree_bit_for_bit(dtype):
    """Paged in any page size or memory layout, and ragged, are one computation. (On a GPU rows that
    are not aligned go to another kernel.)"""
    base = Case(dtype=dtype, batch=((1, 700), (40, 300)))
    unaligned = [replace(base, cache="pool", block_size=7)] if DEVICE == "cpu" else []
    results = []
    for case in (
        base,
        replace(base, cache="hnd"),
        replace(base, block_size=7),
        replace(base, block_size=1),
        replace(base, layout="ragged"),
        *unaligned,
    ):
        results.append([(bits(out), bits(lse)) for out, lse in compute(Problem.make(case))])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("layout", ["paged", "ragged", "dense"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_rows_without_a_visible_key(layout, dtype):
    batch = ((6, 4), (6, 4)) if layout == "dense" else ((6, 4), (1, 0), (3, 0), (2, 5))
    for sinks in (False, True):
        problem = Problem.make(Case(layout, dtype, batch=batch, sinks=sinks))
        for (q_len, seq_len), (out, lse) in zip(batch, compute(problem), strict=True):
            hidden = max(0, q_len - seq_len)
            assert np.all(out[:hidden].astype(np.float32) == 0)
            assert np.all(np.isneginf(lse[:, :hidden]))
            assert np.isfinite(lse[:, hidden:]).all()


def test_nothing_to_do_is_legal():
    none = Problem.make(Case(batch=()))
    assert compute(none) == []
    for batch in (((0, 0),), ((0, 9), (0, 0)), ((2, 0),)):
        for (q_len, _), (out, lse) in zip(
            batch, compute(Problem.make(Case(batch=batch))), strict=True
        ):
            assert out.shape[0] == lse.shape[1] == q_len
    dtype = DTYPES[DTYPE_NAMES[0]]
    empty = np.zeros((0, 5, 2, 8), dtype)
    assert quire.attention(empty, empty, empty).shape == (0, 5, 2, 8)
    no_keys = quire.attention(np.ones((2, 3, 2, 8), dtype), *[np.zeros((2, 0, 2, 8), dtype)] * 2)
    assert no_keys.shape == (2, 3, 2, 8) and not no_keys.any()


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("q_len", [1, 40])
def test_garbage_beyond_use_changes_nothing(dtype, q_len):
    """The same call over NaN, infinities and large numbers in all that is not used."""
    problem = Problem.make(Case(dtype=dtype, batch=((q_len, 45), (q_len, 48), (q_len, 530))))
    results = []
    for garbage in (np.nan, np.inf, -np.inf, 1e4, 0.0):
        k_cache, v_cache, table, seq_lens = problem.paged()
        for cache in (k_cache, v_cache):
            cache[np.isnan(cache.astype(np.float32))] = garbage
        out, lse = quire.paged_attention(
            np.concatenate(problem.qs),
            k_cache,
            v_cache,
            table,
            seq_lens,
            cu_seqlens_q=problem.cu_seqlens_q(),
            return_lse=True,
        )
        results.append((bits(out), bits(lse)))
    assert all(result == results[0] for result in results)
    assert any(entry in GARBAGE for entry in table.ravel().tolist())


@on_cpu
def test_every_isa_passes_the_suite():
    """The whole suite again in a process of its own for each other instruction set."""
    others = [isa for isa in quire.supported_cpu_isas() if isa != quire.cpu_isa()]
    assert "scalar" in others or quire.cpu_isa() == "scalar"
    for isa in others:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", os.path.dirname(__file__), "-x", "-k", "not isa"],
            env={**os.environ, "QUIRE_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{isa}:\n{run.stdout[-3000:]}"
        assert " passed" in run.stdout


@on_cpu
def test_forced_isa_is_the_one_in_use():
    code = "import quire; print(quire.cpu_isa())"
    for isa in quire.supported_cpu_isas():
        env = {**os.environ, "QUIRE_CPU_ISA": isa}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert run.stdout.strip() == isa, run.stderr


def test_an_isa_that_is_unknown_or_not_of_this_cpu_is_refused_with_the_list():
    code = "import quire; quire.cpu_isa()"
    compiled = {row["isa"] for row in quire.capabilities() if row["device"] == "cpu"}
    supported = quire.supported_cpu_isas()
    for isa in {"avx1024", *compiled} - {*supported}:
        env = {**os.environ, "QUIRE_CPU_ISA": isa}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert run.returncode != 0
        expected = f"QUIRE_CPU_ISA: expected one of {', '.join(supported)} on this CPU, got {isa}"
        assert expected in run.stderr


@on_cpu
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("seq_k", [3, 10, 64, 700])
def test_nan_is_not_taken_for_a_row_that_sees_nothing(dtype, seq_k):
    """A query of NaN shows as such however many keys there are; a masked row beside it is empty."""
    rng = np.random.default_rng(seq_k)
    q, k = (rng.standard_normal((1, n, 2, 24)).astype(DTYPES[dtype]) for n in (5, seq_k))
    q[0, 1:3] = np.nan
    mask = np.full((1, 5, (seq_k + 7) // 8), 255, np.uint8)
    mask[0, 2] = 0
    out, lse = quire.attention(q, k, k, mask=mask, return_lse=True)
    out = out.astype(np.float32)
    assert np.isnan(out[0, 1]).all() and np.isnan(lse[0, :, 1]).all()
    assert (out[0, 2] == 0).all() and np.isneginf(lse[0, :, 2]).all()
    assert np.isfinite(out[0, [0, 3, 4]]).all() and np.isfinite(lse[0][:, [0, 3, 4]]).all()
