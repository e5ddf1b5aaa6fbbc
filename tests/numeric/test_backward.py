# SPDX-License-Identifier: Apache-2.0
"""Gradients: the oracle against finite differences, every option against the oracle, and the edge
contract: poison, empty rows, the same bits on any number of threads and in any batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import quire
from cases import DTYPES, Case, Problem
from oracle import Options, attend, attend_backward

MIXED = ((70, 213), (7, 7), (0, 5), (1, 1), (130, 300), (5, 0), (9, 4), (33, 97))
BASE = Case("ragged", num_heads=4, num_kv_heads=2, batch=MIXED)
ALL = {"softcap": 8.0, "alibi": True, "sinks": True, "window": (90, 3), "mask": "full"}


def option_cases() -> list[Case]:
    cases = []
    for dtype in DTYPES:
        base = replace(BASE, dtype=dtype)
        cases += [base, replace(base, causal=False), replace(base, **ALL)]
        cases += [replace(base, num_heads=h * g, num_kv_heads=h) for h, g in ((1, 1), (1, 7))]
        cases += [
            replace(base, head_dim=d, head_dim_v=dv)
            for d, dv in ((1, 1), (40, 24), (72, 128), (192, 128), (300, 17))
        ]
        cases += [replace(base, window=w) for w in ((16, 0), (100, -1), (0, 0), (-1, 5))]
        cases += [
            replace(base, softcap=2.0),
            replace(base, alibi=True),
            replace(base, sinks=True),
            replace(base, mask="full", causal=False),
            replace(base, mask="tree"),
            replace(base, layout="dense", batch=((150, 150),) * 2),
            replace(base, layout="dense", batch=((33, 200),) * 3, causal=False, **ALL),
            replace(base, layout="dense", batch=((100, 20),) * 2, sinks=True),
        ]
    return cases


def poisoned(array: np.ndarray) -> np.ndarray:
    """The same values as a view, surrounded by NaN: odd strides, nothing may be read beyond."""
    *_, heads, dim = array.shape
    memory = np.full((*array.shape[:-2], heads + 2, dim + 3), np.nan, array.dtype)
    view = memory[..., 1 : heads + 1, 2 : dim + 2]
    view[...] = array
    return view


class Call:
    """A problem's forward call, and its gradients."""

    def __init__(self, problem: Problem):
        case = self.case = problem.case
        self.problem = problem
        rng = np.random.default_rng(7)
        dtype = DTYPES[case.dtype]
        self.douts = [
            rng.standard_normal((q, case.num_heads, case.head_dim_v), np.float32).astype(dtype)
            for q, _ in case.batch
        ]
        join = np.stack if case.layout == "dense" else np.concatenate
        self.q, self.k, self.v, self.dout = (
            join(x) for x in (problem.qs, problem.ks, problem.vs, self.douts)
        )
        self.options = dict(problem.extra)
        if case.layout == "ragged":
            self.options["cu_seqlens_q"] = problem.cu_seqlens_q()
            self.options["cu_seqlens_k"] = problem.cu_seqlens_k()
        self.out, self.lse = quire.attention(
            self.q, self.k, self.v, return_lse=True, **self.options
        )

    def gradients(self) -> tuple[np.ndarray, ...]:
        arrays = [poisoned(x) for x in (self.dout, self.q, self.k, self.v, self.out)]
        return quire.attention_backward(*arrays, self.lse, **self.options)

    def by_sequence(self, gradients) -> list[tuple[np.ndarray, ...]]:
        """(dq, dk, dv) of each sequence."""
        dq, dk, dv = gradients[:3]
        if self.case.layout == "dense":
            return list(zip(dq, dk, dv, strict=True))
        cu_q, cu_k = self.problem.cu_seqlens_q(), self.problem.cu_seqlens_k()
        return [
            (dq[cu_q[b] : cu_q[b + 1]], dk[cu_k[b] : cu_k[b + 1]], dv[cu_k[b] : cu_k[b + 1]])
            for b in range(len(self.case.batch))
        ]

    def exact(self) -> list[tuple[np.ndarray, ...]]:
        p = self.problem
        rows = zip(self.douts, p.qs, p.ks, p.vs, p.masks, strict=True)
        return [attend_backward(dout, q, k, v, p.options, m) for dout, q, k, v, m in rows]


@pytest.mark.parametrize("flags", [{}, {"softcap": 3.0, "alibi": True, "sinks": True}])
@pytest.mark.parametrize("causal", [True, False])
def test_the_oracle_agrees_with_finite_differences(flags, causal):
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal(s) for s in ((4, 4, 5), (6, 2, 5), (6, 2, 3), (4, 4, 3)))
    options = Options(
        causal=causal,
        window=(3, -1),
        softcap=flags.get("softcap", 0.0),
        alibi_slopes=rng.uniform(0.1, 0.5, 4) if flags else None,
        sinks=rng.standard_normal(4) if flags else None,
    )
    mask = rng.random((4, 6)) < 0.7
    mask[1] = False
    inputs = [q, k, v, *([options.sinks] if flags else [])]

    def loss() -> float:
        return float((attend(q, k, v, options, mask)[0] * dout).sum())

    for gradient, x in zip(attend_backward(dout, q, k, v, options, mask), inputs, strict=False):
        for i in np.ndindex(x.shape):
            value, step = x[i], 1e-6
            x[i] = value + step
            above = loss()
            x[i] = value - step
            below = loss()
            x[i] = value
            assert abs((above - below) / (2 * step) - gradient[i]) < 1e-7


@pytest.mark.parametrize("case", option_cases(), ids=str)
def test_agrees_with_the_oracle(case: Case):
    """Errors are small beside the largest gradient: 16-bit calls see a rounded `out` and round."""
    call = Call(Problem.make(case))
    gradients = call.gradients()
    assert [g.dtype for g in gradients[:3]] == [call.q.dtype] * 3
    bound = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 1.2e-2}[case.dtype]
    exact = call.exact()
    for i in range(3):
        largest = max(1.0, *(np.abs(e[i]).max(initial=0) for e in exact))
        for got, expected in zip(call.by_sequence(gradients), exact, strict=True):
            assert got[i].shape == expected[i].shape
            error = np.abs(got[i].astype(np.float64) - expected[i]).max(initial=0)
            assert error <= bound * largest, "dq dk dv".split()[i]
    assert len(gradients) == (4 if case.sinks else 3)
    if case.sinks:
        expected = sum(e[3] for e in exact)
        assert np.abs(gradients[3] - expected).max() <= bound * max(1, np.abs(expected).max())


def bits(arrays) -> list[bytes]:
    return [np.ascontiguousarray(x).tobytes() for x in arrays]


@pytest.fixture
def restore_threads():
    before = quire.num_threads()
    yield
    quire.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [{}, ALL])
def test_same_sequence_same_bits(dtype, flags, restore_threads):
    case = replace(BASE, dtype=dtype, **flags)
    call = Call(Problem.make(case))
    quire.set_num_threads(2)
    everything = [bits(x) for x in call.by_sequence(call.gradients())]
    for threads in (1, 5, 16):
        quire.set_num_threads(threads)
        for _ in range(3):
            assert [bits(x) for x in call.by_sequence(call.gradients())] == everything
    for b, lengths in enumerate(case.batch):
        alone = Problem.make(replace(case, batch=(lengths,), mask=""))
        alone.qs, alone.ks, alone.vs = (
            [x[b]] for x in (call.problem.qs, call.problem.ks, call.problem.vs)
        )
        alone.options, alone.extra = call.problem.options, dict(call.problem.extra)
        if case.mask:
            first = int(call.problem.cu_seqlens_q()[b])
            alone.extra["mask"] = call.problem.extra["mask"][first : first + lengths[0]]
        single = Call(alone)
        single.dout = call.douts[b]
        assert bits(single.gradients()[:3]) == everything[b], f"sequence {b} alone"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_keys_that_nobody_sees_may_hold_anything(dtype):
    """Query rows without a key (seq_q > seq_k) and keys outside every window are NaN."""
    nan = np.array(np.nan, DTYPES[dtype])
    few_keys = Call(Problem.make(Case("ragged", dtype, batch=((9, 4), (120, 100)))))
    hidden = np.r_[0:5, 9:29]
    clean = bits(few_keys.gradients())
    few_keys.q[hidden] = few_keys.dout[hidden] = few_keys.out[hidden] = nan
    assert bits(few_keys.gradients()) == clean
    dq = few_keys.gradients()[0]
    assert not dq[hidden].any() and dq[29:].any()

    window = Call(Problem.make(Case("ragged", dtype, batch=((10, 250),), window=(30, 0))))
    clean = bits(window.gradients())
    window.k[:210] = window.v[:210] = nan
    assert bits(window.gradients()) == clean
    _, dk, dv = window.gradients()
    assert not dk[:210].any() and not dv[:210].any() and dk[210:].any()


def test_nothing_to_do_is_legal():
    for q_len, seq_len in ((0, 0), (0, 9), (5, 0)):
        call = Call(Problem.make(replace(BASE, batch=((q_len, seq_len),), sinks=True)))
        dq, dk, dv, dsinks = call.gradients()
        assert dq.shape == call.q.shape and dk.shape == call.k.shape and dv.shape == call.v.shape
        assert not any(x.any() for x in (dq, dk, dv, dsinks))
    empty = np.zeros((0, 5, 2, 8), np.float32)
    lse = np.zeros((0, 2, 5), np.float32)
    assert quire.attention_backward(empty, empty, empty, empty, empty, lse)[0].shape == empty.shape


def test_scale_and_float32_precision():
    """A scale of one's own; against the oracle to a few units in the last place."""
    rng = np.random.default_rng(3)
    q, k, v, dout = (rng.standard_normal((1, 200, 2, 64), np.float32) for _ in range(4))
    out, lse = quire.attention(q, k, v, scale=-0.3, return_lse=True)
    got = quire.attention_backward(dout, q, k, v, out, lse, scale=-0.3)
    exact = attend_backward(dout[0], q[0], k[0], v[0], Options(scale=-0.3))
    for a, b in zip(got, exact, strict=False):
        assert np.abs(a[0] - b).max() < 3e-6 * np.abs(b).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": np.zeros((1, 4, 2, 7), "f4")}, "dout: expected .*1, 4, 2, 8.* got .*1, 4, 2, 7"),
        ({"k": np.zeros((1, 4, 2, 9), "f4")}, "k: expected"),
        ({"v": np.zeros((1, 5, 2, 8), "f4")}, "v: expected"),
        ({"out": np.zeros((1, 4, 2, 8), "f2")}, "out: expected .*float32, got .*float16"),
        ({"lse": np.zeros((1, 4, 2), "f4")}, "lse: expected .*1, 2, 4"),
        ({"sinks": np.zeros(3, "f4")}, "sinks: expected"),
        ({"mask": np.zeros((1, 4, 0), "u1")}, "mask: expected at least 1 bytes"),
        ({"mask_kind": "half"}, "mask_kind: expected"),
        ({"scale": 0.0}, "scale: expected"),
        ({"window": (2**31, 0)}, "window: expected .*got .2147483648, 0"),
        ({"cu_seqlens_q": np.array([0, 4], "i4")}, "cu_seqlens_k: expected both"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, message):
    x = np.zeros((1, 4, 2, 8), "f4")
    arguments = {"dout": x, "q": x, "k": x, "v": x, "out": x, "lse": np.zeros((1, 2, 4), "f4")}
    with pytest.raises(ValueError, match=f"attention_backward: .*{message}"):
        quire.attention_backward(**{**arguments, **change})


@pytest.mark.parametrize("change", [{"causal": 1}, {"softcap": None}, {"dout": None}, {"q": [1]}])
def test_arguments_of_a_wrong_type_are_refused_by_name(change):
    x = np.zeros((1, 4, 2, 8), "f4")
    arguments = {"dout": x, "q": x, "k": x, "v": x, "out": x, "lse": np.zeros((1, 2, 4), "f4")}
    with pytest.raises(TypeError, match=f"^attention_backward: {next(iter(change))}: expected"):
        quire.attention_backward(**{**arguments, **change})
