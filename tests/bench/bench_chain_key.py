# SPDX-License-Identifier: Apache-2.0
"""Chain keys: million tokens a second on one thread, beside hashlib on the same messages.

    python tests/bench/bench_chain_key.py

Best of many short rounds of CPU time, as a shared machine only ever slows a round down.
"""

from __future__ import annotations

import hashlib
import time

import numpy as np
import quire

NUM_TOKENS = 1 << 19


def by_hashlib(tokens: np.ndarray, block_size: int) -> bytes:
    data, size, key = tokens.tobytes(), 4 * block_size, bytes(32)
    for start in range(0, len(data), size):
        key = hashlib.sha256(key + data[start : start + size]).digest()
    return key


def best_rate(function, rounds: int = 40) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        function()
        best = min(best, time.thread_time() - start)
    return NUM_TOKENS / best / 1e6


def main() -> None:
    tokens = np.random.default_rng(0).integers(0, 2**31 - 1, NUM_TOKENS, dtype=np.int32)
    print("block_size  quire Mtok/s  hashlib Mtok/s")
    for block_size in (16, 32, 64, 256):
        ours = best_rate(lambda size=block_size: quire.chain_keys(tokens, size))
        theirs = best_rate(lambda size=block_size: by_hashlib(tokens, size), rounds=5)
        print(f"{block_size:10d}  {ours:12.1f}  {theirs:14.1f}")


if __name__ == "__main__":
    main()
