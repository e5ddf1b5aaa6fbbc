# SPDX-License-Identifier: Apache-2.0
"""Attention on the CPU in full, where `quire bench` shows a part: prefill and paged decode in every
dtype, batch and length against the machine's limits and the installed peers, then block sizes
against each other. Caches are head-major unless said.

    python tests/bench/bench_attention.py [--threads 2] [--samples 9] [--only decode] [--json FILE]

The candidates of a line take turns, because a shared machine drifts: compare the ratios and shares
of one line. Quantised caches: bench_quantised_kv.py. Shared prefixes: bench_shared_prefix.cpp.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import quire
from quire.bench import cases, measure, peers, roofs, table

LLAMA, SMALL = cases.Shape(32, 8, 128), cases.Shape(16, 16, 64)
DTYPES = ("bfloat16", "float16", "float32")
# (sequences, tokens of each), more than the L3 cache holds
BATCHES = ((1, 16384), (8, 4096), (8, 16384), (32, 1024), (32, 4096))
BLOCK_SIZES = (1, 16, 256)
AT_LEAST = 0.05  # seconds of a sample

Maker = Callable[[], cases.Case]


@dataclass(frozen=True)
class Comparison:
    """Two cases of the same work, and how many times as fast as the second the first is."""

    case: str
    dtype: str
    ratio: float
    spread: float  # of the ratios of a round: interquartile range over median

    def __str__(self) -> str:
        return (
            f"{self.case:56} {self.dtype:9} {self.ratio:6.2f} x  spread {100 * self.spread:.0f} %"
        )


def prefills() -> Iterator[Maker]:
    """Causal prompts of 2,048 tokens."""
    for dtype in DTYPES:
        yield lambda dtype=dtype: cases.prefill(LLAMA, 2048, dtype)
    yield lambda: cases.prefill(SMALL, 2048, "bfloat16")


def decodes() -> Iterator[Maker]:
    """One row a sequence over blocks of 16 in no order."""
    for dtype in DTYPES:
        for batch, kv in BATCHES:
            yield lambda dtype=dtype, batch=batch, kv=kv: cases.decode(
                LLAMA, [kv] * batch, 16, "head-major", dtype, f"{batch}x{kv}"
            )


def compare(first: cases.Case, second: cases.Case, samples: int) -> Comparison:
    """The two take turns; each is checked once. Ratios are of neighbours in time."""
    for case in (first, second):
        case.check(case.run(), "quire")
    ratios = []
    for i in range(samples):
        order = (first, second) if i % 2 else (second, first)
        took = {id(case): measure.seconds(case.run, AT_LEAST) for case in order}
        ratios.append(took[id(second)] / took[id(first)])
    low, _, high = statistics.quantiles(ratios, n=4)
    median = statistics.median(ratios)
    name = f"{first.name} against {second.name.removeprefix('paged decode ')}"
    return Comparison(name, first.dtype, median, (high - low) / median)


def block_sizes(shape: cases.Shape, lengths: list[int], samples: int) -> Iterator[Comparison]:
    """Each block size against the next larger one: how much of its speed the smaller has."""
    for layout in ("head-major", "token-major"):
        for dtype in ("bfloat16", "float32"):
            made = [
                cases.decode(shape, lengths, size, layout, dtype, f"{len(lengths)}x1k-16k")
                for size in BLOCK_SIZES
            ]
            for smaller, larger in zip(made, made[1:], strict=False):
                yield compare(smaller, larger, samples)


def main() -> None:
    """Prints a line as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=quire.num_threads())
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--only", choices=("prefill", "decode", "blocks"))
    parser.add_argument("--json", type=Path, help="also write the lines there, as JSON")
    arguments = parser.parse_args()
    quire.set_num_threads(arguments.threads)
    found, roof, lines = peers.installed(arguments.threads), roofs.Roofs(), []
    names = [peer.name for peer in found]
    versions = ", ".join(f"{peer.name} {peer.version}" for peer in found)
    print(f"quire {quire.__version__} ({quire.cpu_isa()}, {arguments.threads} threads), {versions}")
    print(table.head(names))
    for kind, makers in (("prefill", prefills()), ("decode", decodes())):
        for make in makers if arguments.only in (None, kind) else ():
            row = measure.measure(
                make(), found, roof.measure, arguments.threads, arguments.samples, AT_LEAST
            )
            lines.append(table.to_json(row))
            print(table.line(row, names), flush=True)
    if arguments.only in (None, "blocks"):
        lengths = [int(n) for n in np.linspace(1024, 16384, 8)]
        for comparison in block_sizes(LLAMA, lengths, arguments.samples):
            lines.append(json.dumps(vars(comparison)))
            print(comparison, flush=True)
    if arguments.json:
        arguments.json.write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main()
