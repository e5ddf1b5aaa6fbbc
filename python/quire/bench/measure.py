# SPDX-License-Identifier: Apache-2.0
"""Measures a case: quire, the peers and the roof take turns, as a shared machine drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .cases import Case
from .peers import Call, Candidate

# Seconds before a sample: threads of the candidate before wait for more work in a loop, torch's for
# some milliseconds, jax's longer. Then seconds of calls that do not count: cores have to wake up.
_PAUSE, _WARM_UP = 0.3, 0.05


class _Peer(Protocol):
    @property
    def name(self) -> str: ...
    def prepare(self, case: Case) -> Candidate | None: ...


@dataclass(frozen=True)
class Row:
    """Medians of a case. Rates are in units of 1e9 flop or bytes a second."""

    case: str
    dtype: str
    threads: int
    unit: str  # "GFLOP/s" or "GB/s"
    rates: dict[str, float]  # "quire" and every peer that took the case
    roof: float

    @property
    def share(self) -> float:
        """Of the roof that quire reaches."""
        return self.rates["quire"] / self.roof

    def ratio(self, peer: str) -> float | None:
        """How many times as fast as the peer quire is; None where it did not take the case."""
        return self.rates["quire"] / self.rates[peer] if peer in self.rates else None


def seconds(call: Call, at_least: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one call, from enough calls to last `at_least` seconds."""
    calls, start = 0, clock()
    while True:
        call()
        calls += 1
        elapsed = clock() - start
        if elapsed >= at_least:
            return elapsed / calls


def _settle(call: Call) -> None:
    """Before a sample of `call`."""
    time.sleep(_PAUSE)
    end = time.perf_counter() + _WARM_UP
    while time.perf_counter() < end:
        call()


def measure(
    case: Case,
    peers: Sequence[_Peer],
    roof: Callable[[str], float],
    threads: int,
    samples: int,
    at_least: float = 0.1,
) -> Row:
    """Checks every candidate's result once, then takes `samples` of each in rotating order.

    Raises AssertionError where a candidate computes something else.
    """
    calls: dict[str, Call] = {"quire": case.run}
    case.check(case.run(), "quire")
    for peer in peers:
        candidate = peer.prepare(case)
        if candidate is None:
            continue
        call, array_of = candidate
        case.check(array_of(call()), peer.name)
        calls[peer.name] = call
    times: dict[str, list[float]] = {name: [] for name in calls}
    roofs = []
    names = list(calls)
    for i in range(samples):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            _settle(calls[name])
            times[name].append(seconds(calls[name], at_least))
        _settle(lambda: roof(case.roof))
        roofs.append(roof(case.roof))
    return Row(
        case.name,
        case.dtype,
        threads,
        "GB/s" if case.roof == "memory" else "GFLOP/s",
        {name: case.work / statistics.median(t) / 1e9 for name, t in times.items()},
        statistics.median(roofs) / 1e9,
    )
