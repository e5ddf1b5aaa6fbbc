# SPDX-License-Identifier: Apache-2.0
"""A real layer under the replay, and that the check of its rows finds what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import quire
from quire.replay import session
from quire.replay.policies import Geometry, default_kv_bytes, make_policies
from quire.replay.synthetic import synthetic_trace
from quire.replay.verify import Verifier


class Silent:
    def start(self, replay) -> None:
        pass

    update = finish = start


def compare(dtype: str = "float32", rows: int = 60, requests: int = 12) -> session.Comparison:
    trace = synthetic_trace(requests, seed=4)
    geometry = Geometry(num_heads=4, num_kv_heads=2, head_dim=16, dtype=dtype)
    budget = default_kv_bytes(trace, geometry)
    settings = session.Settings(geometry, 16, budget, True, rows, seed=0)
    policies = make_policies(trace, geometry, 16, budget, session.LIMITS.max_seqs)
    return session.compare(trace, policies, settings, Silent())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_of_all_policies_agree_with_float64(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    comparison = compare(dtype)
    assert comparison.verdict is not None
    assert comparison.verdict.passed and comparison.verdict.num_rows == 60
    for outcome in comparison.outcomes:
        assert outcome.decode_gb_per_second and outcome.prefill_gflop_per_second
        assert outcome.leaked_blocks == 0


def test_keys_in_wrong_slots_are_found(monkeypatch):
    append_kv = quire.append_kv

    def shifted(k, v, k_cache, v_cache, slots):
        append_kv(k, v, k_cache, v_cache, np.roll(slots, 1))

    monkeypatch.setattr(quire, "append_kv", shifted)
    assert not compare().verdict.passed


class Wrong(quire.Attention):
    """Every output is off by what a planted error adds to it."""

    planted = 0.0

    def run(self, plan, q, k_cache, v_cache, out):
        super().run(plan, q, k_cache, v_cache, out=out)
        out += np.asarray(self.planted, out.dtype)


@pytest.mark.parametrize(("planted", "passed"), [(0.0, True), (1e-3, False), (np.nan, False)])
def test_a_planted_error_is_found(monkeypatch, planted, passed):
    monkeypatch.setattr(quire, "Attention", Wrong)
    monkeypatch.setattr(Wrong, "planted", planted)
    assert compare().verdict.passed is passed


def test_every_row_is_kept_with_the_same_probability():
    counts = np.zeros(60)
    for seed in range(400):
        verifier = Verifier(12, seed)
        for begin in range(0, 60, 20):
            rows = np.arange(begin, begin + 20, dtype=np.int32)
            verifier.see("paged", rows, rows, np.zeros((20, 1, 1), np.float32))
        kept = [row.request for row in verifier._rows]
        assert len(set(kept)) == 12
        counts[kept] += 1
    # 400 draws of probability 1/5: mean 80, deviation 8.
    assert (np.abs(counts - 80) < 5 * 8).all()


def test_the_default_limit_grows_with_cheaper_requests():
    trace = synthetic_trace(1000, seed=0)
    small = Geometry(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
    large = Geometry(num_heads=32, num_kv_heads=8, head_dim=128, dtype="float32")
    assert 1 <= session.affordable_requests(trace, large) < 1000
    assert session.affordable_requests(trace, small) == 1000
