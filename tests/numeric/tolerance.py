# SPDX-License-Identifier: Apache-2.0
"""The tolerance rule: at most `factor` times the error of the same computation done naively in
the same precision, plus 1e-5. The factor is 2, and 3 where keys are split over work items."""

from __future__ import annotations

import numpy as np

FLOOR = 1e-5
LSE_TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def check_out(out, exact: np.ndarray, naive: np.ndarray, factor: float = 2.0) -> None:
    """Raises AssertionError naming the worst element."""
    got = np.asarray(out).astype(np.float64)
    assert got.shape == exact.shape, f"shape {got.shape}, expected {exact.shape}"
    assert np.isfinite(got).all(), f"{np.count_nonzero(~np.isfinite(got))} elements not finite"
    error = np.abs(got - exact)
    bound = factor * np.abs(naive.astype(np.float64) - exact).max(initial=0) + FLOOR
    worst = error.max(initial=0)
    if worst > bound:
        where = np.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"error {worst:.3g} > {bound:.3g} at {where}: got {got[where]}, expected {exact[where]}"
        )


def check_lse(lse, exact: np.ndarray, dtype: str) -> None:
    """-inf must be -inf exactly; other rows to the precision in which the logits were made."""
    got = np.asarray(lse).astype(np.float64)
    assert got.shape == exact.shape, f"shape {got.shape}, expected {exact.shape}"
    empty = np.isneginf(exact)
    assert np.array_equal(np.isneginf(got), empty), "lse: -inf in the wrong rows"
    error = np.abs(np.where(empty, 0, got) - np.where(empty, 0, exact))
    scale = 1 + np.abs(np.where(empty, 0, exact)).max(initial=0)
    assert error.max(initial=0) <= LSE_TOLERANCE[dtype] * scale, f"lse: error {error.max()}"
