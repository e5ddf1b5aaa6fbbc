# SPDX-License-Identifier: Apache-2.0
"""The lines of `quire bench`: for people, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .measure import Row

_CASE, _DTYPE, _RATE, _RATIO = 44, 9, 17, 12


def head(peers: Sequence[str]) -> str:
    """The line above the rows; a peer's column says how many times as fast as it quire is."""
    columns = "".join(f"{name:>{_RATIO}}" for name in peers)
    return f"{'case':{_CASE}} {'dtype':{_DTYPE}} {'quire':>{_RATE}} {'of roof':>8}{columns}"


def line(row: Row, peers: Sequence[str]) -> str:
    """A row: quire's rate, its share of the roof, and the ratio to each peer."""
    rate = f"{row.rates['quire']:.1f} {row.unit:7}"
    ratios = [row.ratio(name) for name in peers]
    columns = "".join(f"{'-' if x is None else f'{x:.2f} x':>{_RATIO}}" for x in ratios)
    return (
        f"{row.case:{_CASE}} {row.dtype:{_DTYPE}} {rate:>{_RATE}} {100 * row.share:6.0f} %{columns}"
    )


def to_json(row: Row) -> str:
    """A row as one line of JSON."""
    return json.dumps(
        {
            "case": row.case,
            "dtype": row.dtype,
            "threads": row.threads,
            "unit": row.unit,
            "rates": row.rates,
            "roof": row.roof,
            "share_of_roof": row.share,
            "ratios": {name: row.ratio(name) for name in row.rates if name != "quire"},
        },
        allow_nan=False,
    )
