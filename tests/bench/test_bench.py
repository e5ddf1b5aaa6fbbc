# SPDX-License-Identifier: Apache-2.0
"""`quire bench` without a timed assertion: every kind of case is right and notices what is wrong,
measuring takes turns, and the table says what was measured."""

from __future__ import annotations

import json

import bench_attention
import numpy as np
import pytest
import quire
from quire import _core
from quire.bench import cases, measure, peers, roofs, table

SHAPE = cases.Shape(4, 2, 32)
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(measure, "_PAUSE", 0.0)
    monkeypatch.setattr(measure, "_WARM_UP", 0.0)


def small_cases(dtype: str) -> list[cases.Case]:
    made: list[cases.Case] = [cases.prefill(SHAPE, 70, dtype), cases.backward(SHAPE, 70, dtype)]
    for layout in ("head-major", "token-major"):
        for block_size in (1, 16, 256):
            made.append(cases.decode(SHAPE, [5, 300, 33], block_size, layout, dtype, "3 short"))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_case_is_right_and_notices_what_is_wrong(dtype):
    for case in small_cases(dtype):
        result = case.run()
        case.check(result, "quire")
        assert len(case.samples) == 6 and case.work > 0
        wrong = np.array(result, np.float32)
        wrong[case.samples[1][0]] += 0.5
        with pytest.raises(AssertionError, match="somebody is off by"):
            case.check(wrong, "somebody")


@pytest.mark.parametrize("dtype", DTYPES)
def test_installed_peers_compute_the_same(dtype):
    found = peers.installed(1)
    assert "torch" in [peer.name for peer in found]
    for case in small_cases(dtype):
        for peer in found:
            candidate = peer.prepare(case)
            assert candidate is not None or peer.name != "torch"
            if candidate is not None:
                call, array_of = candidate
                case.check(array_of(call()), peer.name)


class Fake:
    """A peer that records its turns in `log`."""

    def __init__(self, name: str, log: list[str], offset: float = 0.0) -> None:
        self.name, self.log, self.offset = name, log, offset

    def prepare(self, case: cases.Case) -> peers.Candidate | None:
        if self.name == "idle":
            return None

        def call() -> np.ndarray:
            self.log.append(self.name)
            return case.run() + np.float32(self.offset)

        return call, lambda result: result


def test_candidates_take_turns_and_a_wrong_one_is_not_timed():
    case, log = cases.prefill(SHAPE, 40, "float32"), []
    asked: list[str] = []

    def roof(name: str) -> float:
        asked.append(name)
        return 4e9

    fakes = [Fake("a", log), Fake("idle", log), Fake("b", log)]
    row = measure.measure(case, fakes, roof, 1, samples=3, at_least=0.0)
    assert log == ["a", "b"] + ["a", "b"] + ["a", "b"] + ["b", "a"]  # checks, then three rounds
    assert asked == ["float32"] * 3
    assert set(row.rates) == {"quire", "a", "b"} and row.roof == 4.0
    assert (row.case, row.unit) == ("causal prefill 1x40 4/2x32", "GFLOP/s")
    with pytest.raises(AssertionError, match="liar is off by"):
        measure.measure(case, [Fake("liar", [], 0.1)], roof, 1, samples=3)


def test_seconds_of_one_call_come_from_enough_calls():
    times = iter([0.0, 0.04, 0.08, 0.12])
    calls: list[int] = []
    assert measure.seconds(lambda: calls.append(1), 0.1, lambda: next(times)) == pytest.approx(0.04)
    assert len(calls) == 3


def test_the_table_says_what_was_measured():
    rates = {"quire": 30.0, "torch": 10.0}
    row = measure.Row("paged decode 1x16k", "bfloat16", 2, "GB/s", rates, 40.0)
    assert row.share == 0.75 and row.ratio("torch") == 3.0 and row.ratio("jax") is None
    head, line = table.head(["torch", "jax"]), table.line(row, ["torch", "jax"])
    assert len(head) == len(line)
    assert line.split() == "paged decode 1x16k bfloat16 30.0 GB/s 75 % 3.00 x -".split()
    for name, cell in (("torch", "3.00 x"), ("jax", "-")):
        assert head.index(name) + len(name) == line.rindex(cell) + len(cell)
    values = json.loads(table.to_json(row))
    assert values["ratios"] == {"torch": 3.0} and values["share_of_roof"] == 0.75
    assert values["rates"] == rates and values["threads"] == 2


def test_cases_of_the_command():
    assert len(cases.standard(quick=True)) == 5
    assert len(cases.standard(quick=False)) == 15


def test_the_full_bench_compares_what_is_right(monkeypatch):
    monkeypatch.setattr(bench_attention, "AT_LEAST", 0.0)
    assert len(list(bench_attention.prefills())) == 4
    assert len(list(bench_attention.decodes())) == 15
    found = list(bench_attention.block_sizes(SHAPE, [5, 300], samples=3))
    assert len(found) == 8 and all(x.ratio > 0 and x.spread >= 0 for x in found)
    assert "b16 head-major against" in found[1].case and "b256 head-major" in found[1].case
    right, wrong = (cases.prefill(SHAPE, 20, "float32") for _ in range(2))
    wrong.run = lambda: right.run() + np.float32(0.1)
    with pytest.raises(AssertionError, match="quire is off by"):
        bench_attention.compare(right, wrong, samples=3)


def test_roofs_are_rates():
    data = np.ones(1 << 16, np.float32)
    assert _core.read_rate(data) > 1e6
    assert _core.multiply_add_rate(False) > 1e7 and _core.multiply_add_rate(True) > 1e7
    with pytest.raises(ValueError, match="read_rate: data: expected"):
        _core.read_rate(np.ones(4))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command(options, monkeypatch):
    testing = pytest.importorskip("typer.testing")
    from quire.commands import app

    makers = [lambda: cases.prefill(SHAPE, 40, "float32")]
    makers += [lambda: cases.decode(SHAPE, [9], 16, "head-major", "bfloat16", "1x9")]
    monkeypatch.setattr(cases, "standard", lambda quick: makers)
    monkeypatch.setattr(peers, "installed", lambda threads: [Fake("fake", [])])
    monkeypatch.setattr(Fake, "version", "7", raising=False)
    monkeypatch.setattr(roofs, "_READ_FLOATS", 1 << 16)
    before = quire.num_threads()
    result = testing.CliRunner().invoke(app, ["bench", "--quick", "--threads", "1", *options])
    quire.set_num_threads(before)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    if options:
        assert [json.loads(line)["case"] for line in lines] == [make().name for make in makers]
    else:
        assert "1 threads), fake 7" in lines[0] and len(lines) == 4
        assert lines[2].startswith("causal prefill 1x40 4/2x32")
