# SPDX-License-Identifier: Apache-2.0
"""Which cached blocks to give up: hit rates of eviction policies on traces of block ids.

    python tests/bench/bench_eviction.py TRACE.jsonl[.gz] [...] [--blocks 5000,10000,20000]

A trace has a line per request with `hash_ids`, the ids of its prefix blocks; equal ids, equal
prefixes. A request hits the longest cached prefix, then all of its blocks are cached. Only a
block without cached children, that the request itself does not use, may be given up. The table
shows the share of all blocks that hit, in percent, without limit and with each capacity; of the
manager itself and of models of policies.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import quire
from eviction_policies import (
    LFU,
    LRU,
    S3FIFO,
    SLRU,
    Belady,
    GhostSLRU,
    Policy,
    ReuseLRU,
    TinyLFU,
)

POLICIES = {
    "LRU": LRU,
    "SLRU 50": type("SLRU50", (SLRU,), {"share": 0.5}),
    "SLRU 80": SLRU,
    "SLRU 80 + ghosts": GhostSLRU,
    "S3-FIFO": S3FIFO,
    "LFU": LFU,
    "TinyLFU": TinyLFU,
    "reuse LRU": ReuseLRU,
}


def read_trace(path: Path) -> list[list[int]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


class Tree:
    """The cached blocks, each with the number of its cached children."""

    def __init__(self) -> None:
        self.num_children: dict[int, int] = {}
        self.parent: dict[int, int] = {}

    def add(self, block: int, parent: int) -> None:
        self.num_children[block] = 0
        self.parent[block] = parent
        if parent in self.num_children:
            self.num_children[parent] += 1

    def remove(self, block: int) -> None:
        del self.num_children[block]
        parent = self.parent.pop(block)
        if parent in self.num_children:
            self.num_children[parent] -= 1


def num_hits(policy: Policy, requests: list[list[int]]) -> int:
    """Blocks that hit in all requests together."""
    tree = Tree()
    hits = 0
    for blocks in requests:
        own = set(blocks)
        count = next((i for i, b in enumerate(blocks) if b not in tree.num_children), len(blocks))
        hits += count
        num_over = len(tree.num_children) + len(blocks) - count - policy.capacity
        may_go = lambda b, own=own: b not in own and tree.num_children[b] == 0  # noqa: E731
        for _ in range(num_over):
            tree.remove(policy.victim(may_go))
        for parent, block in zip([-1, *blocks], blocks, strict=False):
            if block not in tree.num_children:
                tree.add(block, parent)
                policy.admit(block, parent)
        for i in range(len(blocks) - 1, -1, -1):
            (policy.touch if i < count else policy.insert)(blocks[i])
    return hits


def manager_hits(eviction: str, num_blocks: int, requests: list[list[int]]) -> int:
    """The same with the manager itself: a block of one token for each block of the trace."""
    manager = quire.KVCacheManager(num_blocks, 1, eviction=eviction)
    names: dict[int, int] = {}
    hits = 0
    for blocks in requests:
        tokens = [names.setdefault(block, len(names)) for block in blocks]
        seq = manager.create(np.array([*tokens, 0], np.int32))  # the last one is never computed
        hits += seq.num_cached_tokens
        if manager.step([seq], [len(tokens) - seq.num_cached_tokens]) is None:
            raise SystemExit("a request is longer than the capacity")
        manager.commit([seq])
        manager.free([seq])
    return hits


def study(path: Path, capacities: list[int]) -> None:
    requests = read_trace(path)
    total = sum(map(len, requests))
    known: set[int] = set()
    repeated = 0
    for blocks in requests:
        repeated += sum(block in known for block in blocks)
        known.update(blocks)
    longest = max(map(len, requests))
    print(f"{path.name}: {total} blocks, no limit {100 * repeated / total:.1f} %")
    print(f"{'policy':18s}" + "".join(f"{n:>9d}" for n in capacities))
    rows = {name: (lambda n, kind=kind: kind(n)) for name, kind in POLICIES.items()}
    rows["Belady (bound)"] = lambda n: Belady(n, requests)
    for name in ("lru", "reuse_lru"):
        rates = [
            f"{100 * manager_hits(name, n, requests) / total:9.2f}" if n >= longest else "        -"
            for n in capacities
        ]
        print(f"manager, {name:9s}" + "".join(rates), flush=True)
    for name, make in rows.items():
        rates = [
            f"{100 * num_hits(make(n), requests) / total:9.2f}" if n >= longest else "        -"
            for n in capacities
        ]
        print(f"{name:18s}" + "".join(rates), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--blocks", default="5000,10000,20000")
    arguments = parser.parse_args()
    for path in arguments.traces:
        study(path, [int(n) for n in arguments.blocks.split(",")])


if __name__ == "__main__":
    main()
