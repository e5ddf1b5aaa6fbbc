# SPDX-License-Identifier: Apache-2.0
"""What a call costs before any work: the conversion of its tensors, and a whole call of no rows.

    python tests/bench/bench_binding.py [--json FILE]

`convert` is the conversion of six tensors alone, a module of its own (tests/interop/tensor_probe)
less a function that takes the same arguments and does nothing. `run` is `Attention.run` with six
tensors and no query row: conversion, checks, nothing to compute. Nanoseconds of this thread's CPU
time, the least of many rounds; the frameworks take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import quire
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "interop"))
from tensor_probe.build import load_probe  # noqa: E402

Make = Callable[..., Any]
HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 8, 16
FRAMEWORKS: dict[str, tuple[str, Make]] = {
    "NumPy": ("float32", lambda *shape: np.ones(shape, np.float32)),
    "NumPy, ml_dtypes": ("bfloat16", lambda *shape: np.ones(shape, ml_dtypes.bfloat16)),
    "torch": ("float32", lambda *shape: torch.ones(shape)),
}


def nanoseconds(call: Callable[..., object], arguments: tuple[Any, ...]) -> float:
    """Of one call: the best of 20 rounds."""
    best, count = float("inf"), 5000
    for _ in range(20):
        start = time.thread_time_ns()
        for _ in range(count):
            call(*arguments)
        best = min(best, (time.thread_time_ns() - start) / count)
    return best


def empty_run(dtype: str, make: Make) -> tuple[Callable[..., object], tuple[Any, ...]]:
    """`Attention.run` with six tensors on a batch of no sequences."""
    attn = quire.Attention(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=dtype, block_size=BLOCK
    )
    plan = attn.plan(np.zeros((0, 1), np.int32), np.zeros(0, np.int32))
    one = np.ones if make(1).__class__ is np.ndarray else torch.ones
    lse, sinks = one((HEADS, 0)), one(HEADS)
    if one is np.ones:
        lse, sinks = lse.astype("f4"), sinks.astype("f4")
    q, out = make(0, HEADS, DIM), make(0, HEADS, DIM)
    caches = [make(4, BLOCK, KV_HEADS, DIM) for _ in "kv"]
    return attn.run, (plan, q, *caches, out, lse, sinks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    probe = load_probe()
    rows = []
    print(f"quire {quire.__version__}, torch {torch.__version__}, NumPy {np.__version__}")
    print(f"{'six tensors of':18} {'convert':>10} {'run':>10}   nanoseconds a call")
    for name, (dtype, make) in FRAMEWORKS.items():
        six = tuple(make(4, BLOCK, KV_HEADS, DIM) for _ in range(6))
        convert = nanoseconds(probe.convert_six, six) - nanoseconds(probe.take_six, six)
        run = nanoseconds(*empty_run(dtype, make))
        rows.append({"tensors": name, "convert_ns": convert, "run_ns": run})
        print(f"{name:18} {convert:10.0f} {run:10.0f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
