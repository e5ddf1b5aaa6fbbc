# SPDX-License-Identifier: Apache-2.0
"""Checks random output rows of a replay against a float64 reference.

Tolerance of a row: twice the error of the same computation done naively in the layer's own
precision (scores, probabilities and result rounded to it), plus 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .tokens import Int32Array, TokenSource

if TYPE_CHECKING:
    from .attention import TokenTables

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]

_FACTOR = 2.0
_FLOOR = 1e-5


@dataclass(frozen=True)
class _Row:
    policy: str
    request: int
    position: int
    out: Array  # [num_heads, head_dim]


@dataclass(frozen=True)
class Verdict:
    """The row that comes closest to its tolerance, or exceeds it by most."""

    num_rows: int
    policy: str
    request: int
    position: int
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every row is within its tolerance (a NaN is not)."""
        return self.error <= self.tolerance


class Verifier:
    """Keeps `num_rows` of all rows it sees, each with the same probability."""

    def __init__(self, num_rows: int, seed: int) -> None:
        """Start with none."""
        self._num_rows = num_rows
        self._rng = np.random.default_rng(seed)
        self._seen = 0
        self._rows: list[_Row] = []

    def see(self, policy: str, requests: Int32Array, positions: Int32Array, out: Array) -> None:
        """Offers the rows out [n, num_heads, head_dim] of a step; those kept are copied."""
        indices = np.arange(self._seen, self._seen + len(out))
        self._seen += len(out)
        places = self._rng.integers(0, indices + 1)
        places[indices < self._num_rows] = indices[indices < self._num_rows]
        for i in np.flatnonzero(places < self._num_rows):
            row = _Row(policy, int(requests[i]), int(positions[i]), out[i].copy())
            if indices[i] < self._num_rows:
                self._rows.append(row)
            else:
                self._rows[places[i]] = row

    def check(self, source: TokenSource, tables: TokenTables) -> Verdict:
        """Computes the rows again and compares."""
        worst: Verdict | None = None
        for row in self._rows:
            error, tolerance = _check_row(row, source, tables)
            # Written so that a NaN is the worst of all.
            if worst is None or not error / tolerance <= worst.error / worst.tolerance:
                worst = Verdict(
                    len(self._rows), row.policy, row.request, row.position, error, tolerance
                )
        if worst is None:
            raise RuntimeError("verify: expected rows to check, got none")
        return worst


def _check_row(row: _Row, source: TokenSource, tables: TokenTables) -> tuple[float, float]:
    positions = np.arange(row.position + 1, dtype=np.int32)
    rows = tables.rows(source.sequence(row.request, row.position + 1), positions)
    num_kv_heads = tables.k.shape[1]
    q = tables.q[rows[-1]].reshape(num_kv_heads, -1, tables.q.shape[2])
    out = row.out.reshape(q.shape).astype(np.float64)
    error = naive_error = 0.0
    for head in range(num_kv_heads):
        k, v = tables.k[rows, head], tables.v[rows, head]
        exact = _exact(q[head], k, v)
        error = float(np.maximum(error, _max_error(out[head], exact)))  # a NaN stays
        naive_error = max(naive_error, _max_error(_naive(q[head], k, v), exact))
    return error, _FACTOR * naive_error + _FLOOR


def _max_error(got: Float64Array, exact: Float64Array) -> float:
    return float(np.abs(got - exact).max())


def _exact(q: Array, k: Array, v: Array) -> Float64Array:
    """Attention of q [g, d] over k, v [n, d] in float64."""
    scores = q.astype(np.float64) @ k.astype(np.float64).T / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: Float64Array = weights @ v.astype(np.float64) / weights.sum(axis=1, keepdims=True)
    return result


def _naive(q: Array, k: Array, v: Array) -> Float64Array:
    """The same in float32, with scores, probabilities and result rounded to the dtype of q."""

    def rounded(x: Array) -> npt.NDArray[np.float32]:
        return x.astype(q.dtype).astype(np.float32)

    q32, k32, v32 = (x.astype(np.float32) for x in (q, k, v))
    scores = rounded(q32 @ k32.T / np.sqrt(np.float32(q.shape[1])))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights = rounded(weights / weights.sum(axis=1, keepdims=True))
    return rounded(weights @ v32).astype(np.float64)
