# SPDX-License-Identifier: Apache-2.0
"""Decode over quantised KV caches against bfloat16, interleaved in one run.

    python tests/bench/bench_quantised_kv.py [--kv 16384] [--batch 8,32] [--threads 2,1]
                                             [--samples 9] [--prefill 2048] [--json FILE]

32 query heads over 8 kv heads of 128, blocks of 16 tokens in random order, in `KVCache`. All
candidates take turns sample by sample, because a shared machine drifts: compare the ratios of the
medians. Every result is compared with bfloat16 attention over the dequantised cache before anything
is timed. `--prefill N` adds N new tokens after N cached ones, and the time of writing N tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import quire

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
LARGEST = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
# kv_dtype and what has a scale of its own
CANDIDATES = [
    ("bfloat16", "-"),
    ("float8_e4m3", "tensor"),
    ("float8_e4m3", "token"),
    ("float8_e5m2", "tensor"),
    ("int8", "tensor"),
    ("int8", "token"),
]


@dataclass
class Row:
    case: str
    kv_dtype: str
    scales: str
    threads: int
    tokens_per_second: float
    gigabytes_per_second: float  # of K, V and scales; 0 for append_kv
    ratio: float  # to bfloat16
    spread: float  # of the samples: interquartile range over median

    def __str__(self) -> str:
        return (
            f"{self.case:22} {self.kv_dtype:12} {self.scales:7} {self.threads:3} "
            f"{self.tokens_per_second:11.1f} {self.gigabytes_per_second:7.1f} {self.ratio:6.2f} x "
            f"{100 * self.spread:4.0f} %"
        )


class Cache:
    """Random K and V, written by append_kv; `scales` are its keyword arguments."""

    def __init__(self, num_blocks: int, kv_dtype: str, granularity: str):
        self.kv_dtype, self.granularity = kv_dtype, granularity
        storage = quire.KVCache(1, num_blocks, BLOCK, KV_HEADS, DIM, kv_dtype)
        self.k, self.v = storage.k(0), storage.v(0)
        self.scales: dict = {}
        if granularity == "tensor":
            self.scales = {"k_scale": 4 / LARGEST[kv_dtype], "v_scale": 4 / LARGEST[kv_dtype]}
        elif granularity == "token":  # the tokens of a block and head next to each other
            shape = (num_blocks, KV_HEADS, BLOCK)
            self.scales = {
                name: np.ones(shape, np.float32).transpose(0, 2, 1)
                for name in ("k_scale", "v_scale")
            }

    def write(self, k: np.ndarray, v: np.ndarray, slots: np.ndarray) -> None:
        quire.append_kv(k, v, self.k, self.v, slots, **self.scales)

    def fill(self, rng: np.random.Generator) -> None:
        """The same tokens over and over: what they are does not matter to the time."""
        tokens = 4096
        k, v = rng.standard_normal((2, tokens, KV_HEADS, DIM), np.float32).astype(
            ml_dtypes.bfloat16
        )
        for begin in range(0, len(self.k) * BLOCK, tokens):
            count = min(tokens, len(self.k) * BLOCK - begin)
            self.write(k[:count], v[:count], np.arange(begin, begin + count))

    def exact(self, blocks: np.ndarray) -> list[np.ndarray]:
        """K and V of a row of the block table, dequantised, as bfloat16 [1, tokens, ...]."""
        result = []
        for cache, name in ((self.k, "k_scale"), (self.v, "v_scale")):
            values = cache[blocks].astype(np.float32)
            scale = self.scales.get(name, 1.0)
            scale = scale[blocks][..., None] if isinstance(scale, np.ndarray) else scale
            values = (values * scale).reshape(1, -1, KV_HEADS, DIM)
            result.append(values.astype(ml_dtypes.bfloat16))
        return result

    def bytes_of(self, tokens: int) -> int:
        element = 2 if self.kv_dtype == "bfloat16" else 1
        return 2 * tokens * KV_HEADS * (DIM * element + 4 * (self.granularity == "token"))


Call = Callable[[], object]


def decode_calls(batch: int, kv: int, rng: np.random.Generator) -> list[tuple[Cache, Call]]:
    table = rng.permutation(batch * kv // BLOCK).astype(np.int32).reshape(batch, -1)
    seq_lens = np.full(batch, kv, np.int32)
    q = rng.standard_normal((batch, HEADS, DIM), np.float32).astype(ml_dtypes.bfloat16)
    calls = []
    for kv_dtype, granularity in CANDIDATES:
        cache = Cache(table.size, kv_dtype, granularity)
        cache.fill(rng)
        attn = quire.Attention(
            num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, kv_dtype=kv_dtype
        )
        plan = attn.plan(table, seq_lens)
        out = np.empty_like(q)

        def run(attn=attn, plan=plan, cache=cache, out=out) -> np.ndarray:
            return attn.run(plan, q, cache.k, cache.v, out=out, **cache.scales)

        expected = quire.attention(q[None, :1], *cache.exact(table[0]), causal=True)[0, 0]
        error = np.abs(run()[0].astype(np.float32) - expected.astype(np.float32)).max()
        assert error < 4e-3, f"{kv_dtype}, {granularity}: off by {error}"
        calls.append((cache, run))
    return calls


def prefill_calls(new: int, rng: np.random.Generator) -> tuple[list, list]:
    """`new` query rows over 2 * new keys; and writing `new` tokens."""
    blocks = -(-2 * new // BLOCK)
    table = rng.permutation(blocks).astype(np.int32)[None]
    q = rng.standard_normal((new, HEADS, DIM), np.float32).astype(ml_dtypes.bfloat16)
    k, v = rng.standard_normal((2, new, KV_HEADS, DIM), np.float32).astype(ml_dtypes.bfloat16)
    prefills, appends = [], []
    for kv_dtype, granularity in CANDIDATES:
        cache = Cache(blocks, kv_dtype, granularity)
        cache.fill(rng)
        arguments = (q, cache.k, cache.v, table, np.array([2 * new], np.int32))
        options = {"cu_seqlens_q": np.array([0, new], np.int32), "out": np.empty_like(q)}
        options.update(cache.scales)
        prefills.append((cache, lambda a=arguments, o=options: quire.paged_attention(*a, **o)))
        appends.append((cache, lambda cache=cache: cache.write(k, v, np.arange(new))))
    return prefills, appends


def measure(case: str, calls: list, tokens: int, kv_tokens: int, threads: int, samples: int):
    quire.set_num_threads(threads)
    times: list[list[float]] = [[] for _ in calls]
    for sample in range(samples):
        order = list(range(len(calls)))
        for i in order if sample % 2 else reversed(order):
            start = time.perf_counter()
            calls[i][1]()
            times[i].append(time.perf_counter() - start)
    base = statistics.median(times[0])
    for (cache, _), own in zip(calls, times, strict=True):
        median = statistics.median(own)
        low, _, high = statistics.quantiles(own, n=4)
        rate = cache.bytes_of(kv_tokens) / median / 1e9
        yield Row(
            case,
            cache.kv_dtype,
            cache.granularity,
            threads,
            tokens / median,
            rate,
            base / median,
            (high - low) / median,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kv", type=int, default=16384, help="tokens of each sequence")
    parser.add_argument("--batch", default="8,32", help="comma-separated")
    parser.add_argument("--threads", default="2,1", help="comma-separated counts")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--prefill", type=int, default=0, help="new tokens; 0: none")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    threads = [int(count) for count in arguments.threads.split(",")]
    rows: list[Row] = []
    print(f"quire {quire.__version__} ({quire.cpu_isa()})")
    print(f"{'case':22} {'kv_dtype':12} {'scales':7} thr {'tokens/s':>11} {'GB/s':>7}")

    def report(case: str, calls: list, tokens: int, kv_tokens: int) -> None:
        for count in threads:
            for row in measure(case, calls, tokens, kv_tokens, count, arguments.samples):
                rows.append(row)
                print(row, flush=True)

    for batch in map(int, filter(None, arguments.batch.split(","))):
        calls = decode_calls(batch, arguments.kv, rng)
        report(f"decode {batch} x {arguments.kv}", calls, batch, batch * arguments.kv)
        del calls
    if arguments.prefill:
        new = arguments.prefill
        prefills, appends = prefill_calls(new, rng)
        report(f"prefill {new} after {new}", prefills, new, 2 * new)
        report(f"append {new}", appends, new, 0)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
