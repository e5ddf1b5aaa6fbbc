# SPDX-License-Identifier: Apache-2.0
"""What a prefix lookup costs the host: long hits, many siblings, hits inside a block.

CPU time of this thread, called from Python with int32 arrays.

    python tests/bench/bench_prefix_cache.py [--samples 400]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import quire
from bench_allocator import SIZE, measure, prompts, report

CALLS = 16  # between two looks at the clock, which cost a good part of a microsecond


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
        for _ in range(CALLS):
            match(prompt)

    return run


def cold_lookups(samples: int, fresh: bool) -> tuple[float, float]:
    """Each time another prompt of 1,024, 32 MB of tokens: hardly any of it is in a CPU cache.

    `fresh`: but for the array that is asked for, which has just been made of a list, as a
    tokenizer does.
    """
    count = 1024
    manager = quire.KVCacheManager(count * 512, SIZE)
    texts = prompts(count, 8192)
    for text in texts:
        compute(manager, text)
    order = np.random.default_rng(2).integers(0, count, (samples, CALLS)).tolist()
    longer = [np.append(text, np.int32(7)) for text in texts]
    match = manager.match
    times = []
    for some in order:
        asked = [np.array(longer[i].tolist(), np.int32) if fresh else longer[i] for i in some]

        def run(asked: list[np.ndarray] = asked) -> None:
            for tokens in asked:
                match(tokens)

        times.append(measure(run, 1, CALLS)[0])
    return min(times), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=400)
    samples = parser.parse_args().samples
    print(f"{'us of CPU time':46} {'min':>8} {'median':>8}   target")
    manager = quire.KVCacheManager(4096, SIZE)
    text = prompts(1, 8192)[0]
    compute(manager, text)
    run = lookup(manager, np.append(text, np.int32(7)), 8192)
    report("match of 8,192 cached tokens", measure(run, samples, CALLS), "4, aim 1.5")
    report("one of 1,024 prompts, its array just made", cold_lookups(samples, fresh=True), "4")
    report("the same of an array that lay about", cold_lookups(samples, fresh=False), "4")
    inside = text.copy()
    inside[8000] = -1
    run = lookup(manager, inside, 8000)
    report("match of 8,000 tokens, the end inside a block", measure(run, samples, CALLS), "")
    siblings = quire.KVCacheManager(20_000, SIZE)
    for i, prompt in enumerate(prompts(10_000, SIZE, seed=3)):
        prompt[:8] = 5
        prompt[8] = i
        compute(siblings, prompt)
    query = np.full(SIZE + 1, 5, np.int32)
    query[8], query[9:] = 5000, -1
    run = lookup(siblings, query, 9)
    report("best of 10,000 siblings that begin alike", measure(run, samples, CALLS), "")


if __name__ == "__main__":
    main()
