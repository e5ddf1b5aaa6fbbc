# SPDX-License-Identifier: Apache-2.0
"""Which of several engines a request goes to: the one that holds most of its prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint8] | Iterable[bytes]  # [n, 32] as of quire.chain_keys, or n of 32 bytes


@dataclass(frozen=True, eq=False)
class Route:
    """Where a request goes, and what the router has booked for it until `PrefixRouter.finish`."""

    replica: int
    num_matched_blocks: int  # leading blocks that the replica holds, or is about to
    keys: Sequence[bytes]  # of the request's full blocks
    load: float


class PrefixRouter:
    """Picks a replica for each request by the prefix it holds and the load it has.

    Replicas are numbers from 0. What they hold the router learns from their events (`stored`,
    `removed`, `reset`), as chain keys, which are the same in every process; blocks of requests on
    their way count as held already, so that a burst of one prefix stays together. Of the replicas
    whose load is within `max_imbalance` of the least, the one with the longest match gets the
    request; among equals the least loaded, then the one that holds fewest blocks.

    A load is in units of the caller's: requests, or tokens to compute. One thread at a time.

    Args:
        num_replicas: how many there are, 1 or more.
        max_imbalance: how much more load than the least loaded a replica may have and still get a
            request for its prefix; 0: only ties are decided by prefixes.

    Raises:
        ValueError: a count below 1, a negative imbalance, an unknown replica, keys that are not
            of 32 bytes, or a route that is not on its way.

    Example::

        router = PrefixRouter(num_replicas=4, max_imbalance=8)
        route = router.route(quire.chain_keys(prompt, block_size=16))
        ...                                        # send the request to replicas[route.replica]
        router.stored(route.replica, stored_keys)  # as its events tell
        router.finish(route)

    Source: longest prefix first after Zheng et al., SGLang (2024), bounded by load.
    """

    def __init__(self, num_replicas: int, *, max_imbalance: float) -> None:
        """No replica holds or does anything yet."""
        if num_replicas < 1:
            raise ValueError(f"PrefixRouter: num_replicas: expected at least 1, got {num_replicas}")
        if not max_imbalance >= 0:
            raise ValueError(
                f"PrefixRouter: max_imbalance: expected 0 or more, got {max_imbalance}"
            )
        self._max_imbalance = max_imbalance
        self._stored: list[set[bytes]] = [set() for _ in range(num_replicas)]
        self._expected: list[Counter[bytes]] = [Counter() for _ in range(num_replicas)]
        self._on_their_way: list[set[Route]] = [set() for _ in range(num_replicas)]

    def route(self, keys: Keys, load: float = 1.0) -> Route:
        """Picks a replica for a request with these keys, and books `load` until `finish`.

        Example::

            route = router.route(quire.chain_keys(prompt, 16), load=len(prompt))
        """
        wanted = _as_bytes("route", keys)
        if not load >= 0:
            raise ValueError(f"PrefixRouter.route: load: expected 0 or more, got {load}")
        loads = self.loads
        limit = min(loads) + self._max_imbalance
        matches = [
            self._match(replica, wanted) if loads[replica] <= limit else -1
            for replica in range(len(loads))
        ]
        replica = min(
            range(len(loads)), key=lambda r: (-matches[r], loads[r], len(self._stored[r]), r)
        )
        route = Route(replica, matches[replica], wanted, load)
        self._expected[replica].update(wanted)
        self._on_their_way[replica].add(route)
        return route

    def finish(self, route: Route) -> None:
        """The request is done, or has failed: its load is gone, its blocks are those of `stored`.

        Example::

            router.finish(route)
        """
        if route not in self._on_their_way[self._check("finish", route.replica)]:
            raise ValueError("PrefixRouter.finish: route: expected one on its way, got another")
        self._on_their_way[route.replica].remove(route)
        expected = self._expected[route.replica]
        expected.subtract(route.keys)
        for key in route.keys:
            if not expected[key]:
                del expected[key]

    def stored(self, replica: int, keys: Keys) -> None:
        """The replica holds these blocks from now on.

        Example::

            router.stored(0, quire.chain_keys(prompt, 16))
        """
        self._stored[self._check("stored", replica)].update(_as_bytes("stored", keys))

    def removed(self, replica: int, keys: Keys) -> None:
        """The replica has given these blocks up; those it never held are ignored.

        Example::

            router.removed(0, evicted_keys)
        """
        self._stored[self._check("removed", replica)].difference_update(_as_bytes("removed", keys))

    def reset(self, replica: int, keys: Keys = ()) -> None:
        """The replica holds these blocks and no others: it began anew, or events were lost.

        Example::

            router.reset(0)
        """
        self._stored[self._check("reset", replica)] = set(_as_bytes("reset", keys))

    def match(self, keys: Keys) -> list[int]:
        """How many leading blocks each replica holds, or is about to; no side effect.

        Example::

            router.match(quire.chain_keys(prompt, 16))  # [0, 12, 0, 3]
        """
        wanted = _as_bytes("match", keys)
        return [self._match(replica, wanted) for replica in range(len(self._stored))]

    @property
    def loads(self) -> list[float]:
        """Load on its way to each replica."""
        return [sum(route.load for route in routes) for routes in self._on_their_way]

    def _match(self, replica: int, wanted: Sequence[bytes]) -> int:
        stored, expected = self._stored[replica], self._expected[replica]
        for count, key in enumerate(wanted):
            if key not in stored and key not in expected:
                return count
        return len(wanted)

    def _check(self, method: str, replica: int) -> int:
        if not 0 <= replica < len(self._stored):
            raise ValueError(
                f"PrefixRouter.{method}: replica: expected one in [0, {len(self._stored)}), got "
                f"{replica}"
            )
        return replica


def _as_bytes(method: str, keys: Any) -> list[bytes]:
    if isinstance(keys, np.ndarray):
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != 32:
            raise ValueError(
                f"PrefixRouter.{method}: keys: expected uint8 [n, 32], got {keys.dtype} "
                f"{list(keys.shape)}"
            )
        return [row.tobytes() for row in keys]
    listed = list(keys)
    for index, key in enumerate(listed):
        if not isinstance(key, bytes) or len(key) != 32:
            raise ValueError(
                f"PrefixRouter.{method}: keys[{index}]: expected 32 bytes, got {key!r:.60}"
            )
    return listed
