# SPDX-License-Identifier: Apache-2.0
"""Prefix-aware routing: a trace over four replicas (Ray actors), at random and by PrefixRouter.

    pip install ray
    python route_by_prefix.py TRACE.jsonl.gz --requests 500

The trace has `hash_ids`, as those of Mooncake have. A replica runs the bookkeeping of an engine
without its model: what a prompt finds in the prefix cache is what a real one would not compute.
"""

import argparse
import os
from collections import deque
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # one machine, one user
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import quire
import ray
from quire.replay.tokens import TokenSource
from quire.replay.trace import Trace, read_trace
from quire.router import PrefixRouter

BLOCK = 64  # tokens
NUM_REPLICAS = 4
MAX_ON_THEIR_WAY = 16  # requests


class Replica:
    """An engine: it computes what its cache lacks of a prompt."""

    def __init__(self, num_blocks: int) -> None:
        """A cache of `num_blocks` blocks."""
        # A request stores and evicts each block once at most: no event is lost.
        self.manager = quire.KVCacheManager(num_blocks, BLOCK, event_capacity=2 * num_blocks)

    def serve(self, prompt: np.ndarray) -> tuple[int, list[bytes], list[bytes]]:
        """Returns how many tokens were cached, and the keys of blocks stored and removed."""
        seq = self.manager.create(prompt)
        num_cached = seq.num_cached_tokens
        if self.manager.step([seq], [len(prompt) - num_cached]) is None:
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit")
        self.manager.commit([seq])
        self.manager.free([seq])
        return num_cached, *self.events()

    def events(self) -> tuple[list[bytes], list[bytes]]:
        """The keys of what entered the cache since the last call, and of what left it."""
        latest = {event.key: event.kind for event in self.manager.take_events()}
        stored = [key for key, kind in latest.items() if kind == "stored"]
        return stored, [key for key, kind in latest.items() if kind == "evicted"]


class RandomRouter:
    """What PrefixRouter is measured against."""

    def __init__(self) -> None:
        """The same choices in every run."""
        self.random = np.random.default_rng(0)

    def pick(self, prompt: np.ndarray) -> tuple[int, None]:
        """Any replica."""
        return int(self.random.integers(NUM_REPLICAS)), None

    def done(self, replica: int, route: None, stored: list[bytes], removed: list[bytes]) -> None:
        """Nothing is learnt."""


class ByPrefix:
    """PrefixRouter, fed with the events of the replicas."""

    def __init__(self) -> None:
        """A replica may be 16k tokens behind the least loaded one for the sake of a prefix."""
        self.router = PrefixRouter(NUM_REPLICAS, max_imbalance=16384)

    def pick(self, prompt: np.ndarray) -> tuple[int, object]:
        """The replica with the longest prefix, within bounds of load."""
        route = self.router.route(quire.chain_keys(prompt, BLOCK), load=len(prompt))
        return route.replica, route

    def done(self, replica: int, route: object, stored: list[bytes], removed: list[bytes]) -> None:
        """Keeps up with what the replica holds."""
        self.router.stored(replica, stored)
        self.router.removed(replica, removed)
        self.router.finish(route)


def run(name: str, router: RandomRouter | ByPrefix, trace: Trace, num_blocks: int) -> float:
    """Serves the trace in its order; prints and returns the share of cached prompt tokens."""
    replicas = [
        ray.remote(Replica).options(num_cpus=0).remote(num_blocks) for _ in range(NUM_REPLICAS)
    ]
    source = TokenSource(trace)
    on_their_way: deque[tuple[ray.ObjectRef, int, object]] = deque()
    cached, served = 0, np.zeros(NUM_REPLICAS, int)

    def take_oldest() -> int:  # not the first to be ready: routes are the same in every run
        reply, replica, route = on_their_way.popleft()
        num_cached, stored, removed = ray.get(reply)
        router.done(replica, route, stored, removed)
        return num_cached

    for request in range(len(trace)):
        if len(on_their_way) == MAX_ON_THEIR_WAY:
            cached += take_oldest()
        prompt = source.prompt(request)
        replica, route = router.pick(prompt)
        on_their_way.append((replicas[replica].serve.remote(prompt), replica, route))
        served[replica] += len(prompt)
    while on_their_way:
        cached += take_oldest()
    rate, imbalance = cached / served.sum(), served.max() / served.mean()
    print(f"{name:6}  hit rate {rate:6.1%}  most loaded replica {imbalance:.2f} x mean")
    return rate


def main() -> None:
    """Both routers over the first requests of a trace."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=500_000, help="room of a replica's cache")
    options = parser.parse_args()
    trace = read_trace(options.trace).head(options.requests)
    ray.init(
        num_cpus=2,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
    )
    num_blocks = options.tokens // BLOCK
    print(
        f"{len(trace)} requests, {NUM_REPLICAS} replicas of {num_blocks} blocks of {BLOCK} tokens"
    )
    run("random", RandomRouter(), trace, num_blocks)
    run("prefix", ByPrefix(), trace, num_blocks)
    ray.shutdown()


if __name__ == "__main__":
    main()
