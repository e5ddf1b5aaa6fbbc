# SPDX-License-Identifier: Apache-2.0
"""Continuous batching of 2,000 requests, bookkeeping only: requests a second of CPU time.

Prompts of 1,024 to 4,096 tokens, the first 1,024 shared; 200 tokens sampled of each; 256 requests
at once, 8,192 tokens a step, 49,152 blocks. No model runs: all time is the scheduler's, the
manager's and that of the Python loop around them.

    python tests/bench/bench_scheduler.py [--requests 2000] [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import quire


def trace(count: int, seed: int = 7) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 128_000, 1024, np.int32)
    lengths = rng.integers(0, 3073, count)
    return [np.concatenate([shared, rng.integers(0, 128_000, n, np.int32)]) for n in lengths]


def run(prompts: list[np.ndarray], num_new_tokens: int = 200) -> tuple[float, int]:
    """Seconds of CPU time, and steps."""
    manager = quire.KVCacheManager(49_152, 16)
    scheduler = quire.Scheduler(manager, max_tokens_per_step=8192, max_seqs=256)
    sampled = np.full(256, 5, np.int32)
    num_finished = num_steps = 0
    begin = time.thread_time_ns()
    for prompt in prompts:
        scheduler.add(prompt, num_new_tokens)
    while (batch := scheduler.schedule()) is not None:
        num_finished += len(scheduler.commit(sampled[: len(batch.sampling)]))
        num_steps += 1
    seconds = (time.thread_time_ns() - begin) * 1e-9
    assert num_finished == len(prompts)
    return seconds, num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    prompts = trace(args.requests)
    runs = [run(prompts) for _ in range(args.runs)]
    times = [seconds for seconds, _ in runs]
    best, median = args.requests / min(times), args.requests / statistics.median(times)
    print(f"{runs[0][1]} steps; requests/s: best {best:,.0f}, median {median:,.0f}")
    print(f"us of CPU time a step, least: {min(times) / runs[0][1] * 1e6:.1f}")


if __name__ == "__main__":
    main()
