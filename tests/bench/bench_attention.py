# SPDX-License-Identifier: Apache-2.0
"""CPU attention: quire against torch, in one interleaved run, as ratios and as shares of a roof.

    python tests/bench/bench_attention.py [--quick] [--threads 2,1] [--json FILE]

Prefill is compared with `scaled_dot_product_attention`; paged decode with gathering the blocks by
`index_select` and the same. Results are compared before anything is timed. The candidates and the
roof (a loop of multiply-adds; a sequential read) take turns, because a shared machine drifts:
compare ratios and percentages, not absolute figures of different rows. torch is the yardstick
here and nothing that quire needs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import quire
import torch
import torch.nn.functional as F

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16


@dataclass
class Row:
    case: str
    dtype: str
    threads: int
    unit: str  # of the figures: GFLOP/s or GB/s
    quire: float
    torch: float
    roof: float | None
    ratio: float

    def __str__(self) -> str:
        share = f"{100 * self.quire / self.roof:5.0f} %" if self.roof else "      -"
        return (
            f"{self.case:28} {self.dtype:9} {self.threads:3}  {self.quire:8.1f} {self.torch:8.1f} "
            f"{self.unit:8} {self.ratio:7.2f} x {share}"
        )


class Roofs:
    """The machine's limits, by a few lines of C; without a compiler they are left out."""

    def __init__(self) -> None:
        self.library = None
        compiler = shutil.which("cc")
        if compiler is None:
            return
        folder = tempfile.mkdtemp()
        target = f"{folder}/roofs.so"
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        width = 64 if "avx512f" in flags else 32 if "avx2" in flags else 16
        source = str(Path(__file__).with_name("roofs.c"))
        options = ["-O3", "-march=native", "-ffp-contract=fast", f"-DROOF_VECTOR_BYTES={width}"]
        if width == 64:
            options.append("-mprefer-vector-width=512")
        subprocess.run([compiler, *options, "-shared", "-fPIC", source, "-o", target], check=True)
        self.library = ctypes.CDLL(target)
        self.library.roof_multiply_add.restype = self.library.roof_read.restype = ctypes.c_double
        self.data = torch.ones(64 << 20)

    def measure(self, unit: str, threads: int) -> float | None:
        """GFLOP/s or GB/s of `threads` threads together."""
        if self.library is None:
            return None
        work = self._multiply_add if unit == "GFLOP/s" else self._read
        done = [0.0] * threads
        workers = [threading.Thread(target=work, args=(i, done)) for i in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(done) / (time.perf_counter() - start) / 1e9

    def _multiply_add(self, i: int, done: list[float]) -> None:
        sink = ctypes.c_float(0.5)
        done[i] = self.library.roof_multiply_add(ctypes.c_long(20_000_000), ctypes.byref(sink))

    def _read(self, i: int, done: list[float]) -> None:
        count = self.data.numel() // len(done)
        begin = ctypes.c_void_p(self.data.data_ptr() + 4 * i * count)
        done[i] = self.library.roof_read(
            begin, ctypes.c_size_t(count), ctypes.byref(ctypes.c_float())
        )


@dataclass
class Case:
    name: str
    dtype: torch.dtype
    unit: str
    work: float  # floating-point operations or bytes
    quire: Callable[[], torch.Tensor]
    torch: Callable[[], torch.Tensor]


def prefill(dtype: torch.dtype, length: int) -> Case:
    q = torch.randn(1, length, HEADS, DIM).to(dtype)
    k, v = (torch.randn(1, length, KV_HEADS, DIM).to(dtype) for _ in "kv")
    out = torch.empty_like(q)
    transposed = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def peer() -> torch.Tensor:
        out = F.scaled_dot_product_attention(*transposed, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    pairs = length * (length + 1) / 2
    return Case(
        f"prefill 1 x {length} causal",
        dtype,
        "GFLOP/s",
        4 * pairs * HEADS * DIM,
        lambda: quire.attention(q, k, v, causal=True, out=out),
        peer,
    )


def make_cache(layout: str, num_blocks: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """K and V as views [num_blocks, BLOCK, KV_HEADS, DIM] of the layout's memory."""
    if layout == "nhd":
        return [torch.randn(num_blocks, BLOCK, KV_HEADS, DIM).to(dtype) for _ in "kv"]
    pool = torch.randn(num_blocks, KV_HEADS, 2, BLOCK, DIM).to(dtype)  # K of a head next to its V
    return [pool[:, :, i].transpose(1, 2) for i in range(2)]


def decode(dtype: torch.dtype, batch: int, length: int, layout: str) -> Case:
    blocks = length // BLOCK
    k_cache, v_cache = make_cache(layout, batch * blocks, dtype)
    table = torch.randperm(batch * blocks).to(torch.int32).reshape(batch, blocks)
    seq_lens = torch.full((batch,), length, dtype=torch.int32)
    q = torch.randn(batch, HEADS, DIM).to(dtype)
    out = torch.empty_like(q)

    def gathered(cache: torch.Tensor) -> torch.Tensor:
        rows = cache.index_select(0, table.flatten())
        return rows.reshape(batch, length, KV_HEADS, DIM).transpose(1, 2)

    def peer() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q[:, :, None], gathered(k_cache), gathered(v_cache), enable_gqa=True
        )[:, :, 0]

    return Case(
        f"decode {batch} x {length} {layout}",
        dtype,
        "GB/s",
        2.0 * batch * length * KV_HEADS * DIM * dtype.itemsize,
        lambda: quire.paged_attention(q, k_cache, v_cache, table, seq_lens, out=out),
        peer,
    )


def seconds(call: Callable[[], object], at_least: float) -> float:
    """Of one call, from enough calls to last `at_least` seconds."""
    calls, start = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        if (elapsed := time.perf_counter() - start) >= at_least:
            return elapsed / calls


def run(case: Case, threads: int, samples: int, roofs: Roofs) -> Row:
    quire.set_num_threads(threads)
    torch.set_num_threads(threads)
    error = (case.quire().float() - case.torch().float()).abs().max().item()
    assert error < TOLERANCE[case.dtype], f"{case.name}: differs from torch by {error}"
    times: dict[str, list[float]] = {"quire": [], "torch": []}
    roof = []
    for i in range(samples):
        for name in ("quire", "torch") if i % 2 else ("torch", "quire"):
            times[name].append(seconds(getattr(case, name), 0.1))
        roof.append(roofs.measure(case.unit, threads))
    ours, theirs = (statistics.median(times[name]) for name in ("quire", "torch"))
    return Row(
        case.name,
        str(case.dtype).removeprefix("torch."),
        threads,
        case.unit,
        case.work / ours / 1e9,
        case.work / theirs / 1e9,
        statistics.median(roof) if None not in roof else None,
        theirs / ours,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples")
    parser.add_argument("--threads", default="2,1", help="comma-separated counts")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    roofs, rows = Roofs(), []
    makers: list[Callable[[], Case]] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        makers.append(lambda dtype=dtype: prefill(dtype, 2048))
        if not arguments.quick:
            makers.append(lambda dtype=dtype: prefill(dtype, 512))
        for layout in ("head",) if arguments.quick else ("nhd", "head"):
            makers.append(lambda dtype=dtype, layout=layout: decode(dtype, 32, 1024, layout))
        if not arguments.quick:
            makers.append(lambda dtype=dtype: decode(dtype, 1, 16384, "head"))
    print(f"quire {quire.__version__} ({quire.cpu_isa()}), torch {torch.__version__}")
    print(f"{'case':28} {'dtype':9} thr  {'quire':>8} {'torch':>8} {'':8} {'ratio':>9} of roof")
    for make in makers:
        case = make()
        for threads in map(int, arguments.threads.split(",")):
            rows.append(run(case, threads, 3 if arguments.quick else 7, roofs))
            print(rows[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
