# SPDX-License-Identifier: Apache-2.0
"""What a prefix lookup costs the host: long hits, many siblings, hits inside a block.

CPU time of this thread, called from Python with int32 arrays.

    python tests/bench/bench_prefix_cache.py [--samples 400]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import quire
from bench_allocator import SIZE, measure, prompts, report


def compute(manager: quire.KVCacheManager, prompt: np.ndarray) -> None:
    """Caches a prompt's blocks."""
    seq = manager.create(prompt)
    assert manager.step([seq], [seq.num_tokens - seq.num_computed_tokens]) is not None
    manager.commit([seq])
    manager.free([seq])


def lookup(manager: quire.KVCacheManager, prompt: np.ndarray, hit: int) -> Callable[[], None]:
    assert manager.match(prompt) == hit
    match = manager.match

    def run() -> None:
        for _ in range(16):  # the clock itself costs a good part of a microsecond
            match(prompt)

    return run


def cold_lookups(samples: int) -> tuple[float, float]:
    """Each time another prompt of a pool of 64 MB of tokens: nothing of it is in a CPU cache."""
    count = 128
    manager = quire.KVCacheManager(count * 512, SIZE)
    texts = prompts(count, 8192)
    for text in texts:
        compute(manager, text)
    order = iter(np.random.default_rng(2).integers(0, count, samples).tolist())
    longer = [np.append(text, np.int32(7)) for text in texts]
    return measure(lambda: (manager.match(longer[next(order)]), None)[1], samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=400)
    samples = parser.parse_args().samples
    print(f"{'us of CPU time':46} {'min':>8} {'median':>8}   target")
    manager = quire.KVCacheManager(4096, SIZE)
    text = prompts(1, 8192)[0]
    compute(manager, text)
    run = lookup(manager, np.append(text, np.int32(7)), 8192)
    report("match of 8,192 cached tokens", measure(run, samples, 16), "4, aim 1.5")
    report("the same, none of it in a CPU cache", cold_lookups(samples), "4")
    inside = text.copy()
    inside[8000] = -1
    run = lookup(manager, inside, 8000)
    report("match of 8,000 tokens, the end inside a block", measure(run, samples, 16), "")
    siblings = quire.KVCacheManager(20_000, SIZE)
    for i, prompt in enumerate(prompts(10_000, SIZE, seed=3)):
        prompt[:8] = 5
        prompt[8] = i
        compute(siblings, prompt)
    query = np.full(SIZE + 1, 5, np.int32)
    query[8], query[9:] = 5000, -1
    run = lookup(siblings, query, 9)
    report("best of 10,000 siblings that begin alike", measure(run, samples, 16), "")


if __name__ == "__main__":
    main()
