# SPDX-License-Identifier: Apache-2.0
"""What the KV runtime costs the host: decode steps, allocation, eviction, forks, memory a block.

CPU time of this thread, called from Python with all arguments ready as arrays.

    python tests/bench/bench_allocator.py [--samples 200]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import quire

SIZE = 16  # tokens a block


def measure(call: Callable[[], None], samples: int, calls: int = 1) -> tuple[float, float]:
    """Least and median time of `call`, in us a call of the `calls` that it makes."""
    times = []
    for _ in range(samples):
        begin = time.thread_time_ns()
        call()
        times.append((time.thread_time_ns() - begin) / calls / 1e3)
    return min(times), statistics.median(times)


def report(name: str, times: tuple[float, float], target: str) -> None:
    print(f"{name:46} {times[0]:8.2f} {times[1]:8.2f}   {target}")


def prompts(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 128_000, length, np.int32) for _ in range(count)]


def decode(batch: int, caching: bool, samples: int) -> tuple[float, float]:
    """One step and one commit of sequences whose lengths differ."""
    lengths = np.random.default_rng(1).integers(1024, 1536, batch)
    manager = quire.KVCacheManager(batch * 400, SIZE, prefix_caching=caching)
    seqs = [manager.create(p[:n]) for p, n in zip(prompts(batch, 1536), lengths, strict=True)]
    ids = np.array([seq.id for seq in seqs], np.int64)
    ones, sampled = np.ones(batch, np.int32), np.arange(batch, dtype=np.int32)
    manager.step(ids, lengths.astype(np.int32))
    manager.commit(ids, sampled)
    step, commit = manager.step, manager.commit

    def run() -> None:
        for _ in range(SIZE):  # every sequence begins one block
            step(ids, ones)
            commit(ids, sampled)

    run()
    samples = min(samples, 4000 // SIZE)
    return measure(run, samples, SIZE)


def blocks_alone(samples: int) -> tuple[float, float]:
    """512 blocks for one token and its lookahead, so that hardly any slot is written."""
    manager = quire.KVCacheManager(4096, SIZE, prefix_caching=False)
    one, prompt = np.ones(1, np.int32), np.ones(1, np.int32)
    times = []
    for _ in range(samples):
        ids = np.array([manager.create(prompt).id], np.int64)
        begin = time.thread_time_ns()
        manager.step(ids, one, lookahead=512 * SIZE - 1)
        manager.free(ids)
        times.append((time.thread_time_ns() - begin) / 1e3)
    return min(times), statistics.median(times)


def allocate_and_free(samples: int, evicting: bool) -> tuple[float, float]:
    """A step of 512 new blocks and 8,192 slots, then the end of its sequence; no create()."""
    manager = quire.KVCacheManager(4096, SIZE, prefix_caching=evicting)
    count = np.array([512 * SIZE], np.int32)
    times = []
    for i, prompt in enumerate(prompts(samples + 16, 512 * SIZE)):
        ids = np.array([manager.create(prompt).id], np.int64)
        begin = time.thread_time_ns()
        manager.step(ids, count)
        allocated = time.thread_time_ns()
        manager.commit(ids)
        committed = time.thread_time_ns()
        manager.free(ids)
        end = time.thread_time_ns()
        if i >= 16:
            times.append((allocated - begin + end - committed) / 1e3)
    return min(times), statistics.median(times)


def fork(samples: int) -> tuple[float, float]:
    """64 children of a sequence of 512 blocks."""
    manager = quire.KVCacheManager(4096, SIZE)
    seq = manager.create(prompts(1, 512 * SIZE + 5)[0])
    manager.step([seq], [seq.num_tokens])
    manager.commit([seq])
    times = []
    for _ in range(samples):
        begin = time.thread_time_ns()
        children = manager.fork(seq, 64)
        times.append((time.thread_time_ns() - begin) / 1e3)
        manager.free(children)
    return min(times), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200)
    samples = parser.parse_args().samples
    print(f"{'us of CPU time':46} {'min':>8} {'median':>8}   target")
    for batch, target in ((256, "6, aim 2"), (1000, "10, aim 3")):
        for caching in (True, False):
            name = f"step + commit, {batch} sequences, caching {'on' if caching else 'off'}"
            report(name, decode(batch, caching, samples), target)
    report("allocate + free 512 blocks, caching off", blocks_alone(samples), "5")
    report("the same with 8,192 slots", allocate_and_free(samples, False), "")
    report("  and every block evicts a cached one", allocate_and_free(samples, True), "15")
    report("fork into 64 children, 512 blocks", fork(samples), "2 in C++ (bench_kv_cache)")
    stats = quire.KVCacheManager(100_000, SIZE).stats()
    print(f"bytes a block, its 16 cached tokens included: {stats.num_bytes / 100_000:.2f} (64)")


if __name__ == "__main__":
    main()
