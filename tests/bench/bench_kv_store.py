# SPDX-License-Identifier: Apache-2.0
"""The stores: bytes a second, and how soon a large directory gives its first hit after a restart.

    python tests/bench/bench_kv_store.py [--folder DIR]

Medians. The large directory's blocks are real files of the right size and name, but sparse except
for the one that is read: opening lists names and reads no block.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import quire

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HEADER = 64  # bytes of a block's file before the payload


def rates(store: quire.KVStore, block: np.ndarray, count: int) -> tuple[float, float]:
    """GB/s of puts, as many at once as the queue takes, and of gets one at a time (median)."""
    keys = quire.chain_keys(np.arange(count, dtype=np.int32), 1)
    start = time.perf_counter()
    for key in keys:
        while store.put(key, block) is None:
            store.drain()
    store.drain()
    put = count * block.nbytes / (time.perf_counter() - start)
    out = np.empty_like(block)
    times = []
    for key in keys:
        start = time.perf_counter()
        outcome = store.get(key, out).wait()
        times.append(time.perf_counter() - start)
        assert outcome == "done" and np.array_equal(out, block)
    return put / 1e9, block.nbytes / statistics.median(times) / 1e9


def first_hit(folder: Path, num_blocks: int, block_bytes: int) -> tuple[float, float]:
    """Seconds to open a directory of num_blocks blocks, and until its first hit is delivered."""
    capacity = num_blocks * block_bytes
    key = quire.chain_keys([-1], 1)[0]
    block = np.ones(block_bytes, np.uint8)
    quire.FileStore(str(folder), capacity, block_bytes).put(key, block).wait()
    others = quire.chain_keys(np.arange(num_blocks - 1, dtype=np.int32), 1)
    for age, other in enumerate(others, 1):
        with open(folder / f"{age:016x}-{other.tobytes().hex()}.kv", "wb") as file:
            file.truncate(HEADER + block_bytes)
    opened, hit = [], []
    for _ in range(5):
        start = time.perf_counter()
        store = quire.FileStore(str(folder), capacity, block_bytes)
        opened.append(time.perf_counter() - start)
        assert store.get(key, np.empty_like(block)).wait() == "done"
        hit.append(time.perf_counter() - start)
        assert store.stats()["num_blocks"] == num_blocks
        del store
    return statistics.median(opened), statistics.median(hit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=None, help="where to put the directories")
    arguments = parser.parse_args()
    print("store  block KiB  put GB/s  get GB/s")
    for block_bytes in (64 * KIB, 2 * MIB):
        block = np.random.default_rng(0).integers(0, 256, block_bytes, dtype=np.uint8)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            for name, store in (
                ("host", quire.HostStore(GIB, block_bytes)),
                ("file", quire.FileStore(folder, GIB, block_bytes)),
            ):
                put, get = rates(store, block, 100)
                print(f"{name:5s}  {block_bytes // KIB:9d}  {put:8.2f}  {get:8.2f}")
                del store
    print("directory of 10 GiB: blocks  block KiB  open s  first hit s")
    for block_bytes in (64 * KIB, 2 * MIB):
        num_blocks = 10 * GIB // block_bytes
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            opened, hit = first_hit(Path(folder), num_blocks, block_bytes)
            print(f"{num_blocks:27d}  {block_bytes // KIB:9d}  {opened:6.3f}  {hit:11.3f}")


if __name__ == "__main__":
    main()
