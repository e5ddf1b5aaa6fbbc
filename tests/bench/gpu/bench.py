# SPDX-License-Identifier: Apache-2.0
"""quire on a GPU against what is there, in one run: interleaved medians, ratios, and shares of the
copy bandwidth and the matrix rate that the same run has measured.

    python tests/bench/gpu/steps.py --seconds 300 tests/bench/gpu/bench.py [--device cuda|cpu]
        [--out FOLDER]

Every candidate's result is compared with quire's, and quire's with a float32 computation, before
anything is timed; a candidate that fails is left out. Cases that no time is left for are named. The
table is printed, its rows are added to FOLDER/bench.jsonl."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import quire
import torch
from peers import decode_calls, prefill_calls
from problems import Decode, Prefill, decodes, prefills
from steps import Steps
from timing import Clock, interleave

TOLERANCE = 3e-2  # of bfloat16 results of random data


class Report:
    """Lines to the screen, rows to a file."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.rows = (out / "bench.jsonl").open("a")
        self.is_content = True

    def line(self, text: str) -> None:
        print(text, flush=True)

    def wrong(self, case: object, text: str) -> None:
        self.is_content = False
        self.line(f"{case!s:34} {text}")

    def row(self, case: str, times: dict[str, float], work: float, unit: str, roof: float) -> None:
        """`work` in FLOP or bytes; `unit` TFLOP/s or TB/s; `roof` likewise a second."""
        own = times["quire"]
        cells = [
            f"{name} {work / t * 1e-12:7.2f} {unit} {1e6 * t:8.1f} us"
            + (f" ({t / own:.2f}x)" if name != "quire" else f" ({100 * work / t / roof:.0f} %)")
            for name, t in times.items()
        ]
        self.line(f"{case:34} " + " | ".join(cells))
        record = {"case": case, "unit": unit, "work": work, "roof": roof, "seconds": times}
        self.rows.write(json.dumps(record) + "\n")
        self.rows.flush()


def ceilings(clock: Clock, device: str) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), FLOP a second of a bfloat16 matrix product."""
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in "ab")
    source = torch.empty(
        (4 << 30) if device == "cuda" else 1 << 20, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    calls = {"copy": lambda _: target.copy_(source), "gemm": lambda _: a @ b}
    times = interleave(clock, calls, 4, 7, graph=False)
    return 2 * source.numel() / times["copy"], 2 * size**3 / times["gemm"]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """In float32, of [seq, heads, dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) / q.shape[-1] ** 0.5
    if causal:
        rows, keys = scores.shape[1:]
        hidden = torch.ones(rows, keys, device=q.device).triu(keys - rows + 1).bool()
        scores.masked_fill_(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def check(name: str, got: torch.Tensor, expected: torch.Tensor) -> str:
    """Empty, or what is wrong."""
    error = (got.float() - expected.float()).abs().max().item()
    return "" if error <= TOLERANCE else f"{name} is off by {error:.3g}"


def check_prefill(p: Prefill, out: torch.Tensor) -> str:
    k, v = p.sets[0]
    rows = slice(p.seq - 64, p.seq)  # the last ones, which see most
    return check("quire", out[0, rows], reference(p.q[0, rows], k[0], v[0], p.causal))


def check_decode(p: Decode, out: torch.Tensor) -> str:
    b = len(p.lens) - 1
    blocks = torch.from_numpy(p.table[b, : -(-p.lens[b] // p.page)].astype(np.int64)).to(p.device)
    k, v = (x[blocks].float().flatten(0, 1)[: p.lens[b]] for x in p.caches[0])
    return check("quire", out[b], reference(p.q[b : b + 1], k, v, False)[0])


def check_all(problem: Prefill | Decode, calls: dict, report: Report) -> None:
    """Says what is wrong, and drops the candidates that cannot be called."""
    out = calls["quire"](0).clone()
    wrong = (check_prefill if isinstance(problem, Prefill) else check_decode)(problem, out)
    if wrong:
        report.wrong(problem, f"WRONG: {wrong}")
    for name in [name for name in calls if name != "quire"]:
        try:
            if wrong := check(name, calls[name](0), out):
                report.wrong(problem, f"WRONG: {wrong}")
        except Exception as error:  # the others may work
            del calls[name]
            report.wrong(problem, f"{name} FAILED: {type(error).__name__}: {error}")


def run_case(clock: Clock, problem: Prefill | Decode, report: Report, roofs: tuple) -> None:
    copy, gemm = roofs
    is_prefill = isinstance(problem, Prefill)
    calls = prefill_calls(problem) if is_prefill else decode_calls(problem)
    check_all(problem, calls, report)
    if is_prefill:  # long kernels: the host is ahead anyway
        times = interleave(clock, calls, 4, 9, graph=False)
        report.row(str(problem), times, problem.flops, "TFLOP/s", gemm)
    else:
        count = max(4, len(problem.caches))
        times = interleave(clock, calls, count, 15)
        report.row(str(problem), times, problem.kv_bytes, "TB/s", copy)


def small_operations(clock: Clock, device: str, report: Report, copy: float) -> None:
    blocks = 4096 if device == "cuda" else 8
    cache = torch.zeros(2, blocks, 16, 8, 128, device=device, dtype=torch.bfloat16)
    for tokens in (64, 8192) if device == "cuda" else (8,):
        k = torch.randn(tokens, 8, 128, device=device).bfloat16()
        slots = torch.randperm(blocks * 16, device=device)[:tokens]
        rope = quire.Rope(
            torch.randn(4096, 128, device=device),
            torch.randint(4096, (tokens,), device=device, dtype=torch.int32),
        )
        for name, turn in (("", None), (" + rope", rope)):
            call = lambda _, k=k, s=slots, r=turn: quire.append_kv(k, k, *cache, s, rope=r)  # noqa: E731
            if device == "cpu":
                call = lambda _, k=k, s=slots: quire.append_kv(k, k, *cache, s)  # noqa: E731
            times = interleave(clock, {"quire": call}, 8, 9)
            report.row(f"append_kv {tokens} x 8 x 128{name}", times, 8 * k.numel(), "TB/s", copy)
        codes = cache.to(torch.float8_e4m3fn)
        scales = dict.fromkeys(("k_scale", "v_scale"), 0.5)
        call = lambda _, k=k, s=slots, c=codes, o=scales: quire.append_kv(k, k, *c, s, **o)  # noqa: E731
        times = interleave(clock, {"quire": call}, 8, 9)
        report.row(f"append_kv {tokens} x 8 x 128 e4m3", times, 6 * k.numel(), "TB/s", copy)
    pairs = np.arange(blocks, dtype=np.int32).reshape(2, -1).T.copy()
    work = 2 * cache.numel()  # half of it read, as much written, 2 bytes each
    call = {"quire": lambda _: quire.copy_blocks(*cache, pairs)}
    times = interleave(clock, call, 4, 9, graph=False)
    report.row(f"copy_blocks {blocks // 2}", times, work, "TB/s", copy)
    outs = torch.randn(8, 64, 64, 128, device=device).bfloat16()
    lses = torch.randn(8, 64, 64, device=device)
    times = interleave(clock, {"quire": lambda _: quire.merge_states(outs, lses)[0]}, 8, 9)
    report.row("merge_states 8 x 64 x 64 x 128", times, 2 * outs.numel() * 9 / 8, "TB/s", copy)


def plans(clock: Clock, device: str, report: Report) -> None:
    """On the host: a step's plan, and with it whatever the device will need of it. On the device:
    the planner alone, replayed as a graph."""
    for batch, seq in ((64, 8192), (256, 1024), (1, 1024)) if device == "cuda" else ((4, 90),):
        attn = quire.Attention(
            num_heads=64, num_kv_heads=8, head_dim=128, block_size=16, device=device
        )
        table = np.arange(batch * (-(-seq // 16)), dtype=np.int32).reshape(batch, -1)
        seq_lens = np.full(batch, seq, np.int32)
        times = []
        for _ in range(50):
            begin = time.perf_counter()
            attn.plan(table, seq_lens)
            times.append(time.perf_counter() - begin)
        text = f"{f'plan {batch}x{seq} 64/8':34} quire {1e6 * float(np.median(times)):8.1f} us"
        if device == "cuda":
            arrays = [torch.from_numpy(x).to(device) for x in (table, seq_lens)]
            call = {"quire": lambda _, a=attn, x=arrays: a.plan(*x)}
            text += f" | on the device {1e6 * interleave(clock, call, 8, 9)['quire']:8.1f} us"
        report.line(text)


def leave_if_dead(device: str) -> None:
    """After a failure. Nothing works any more in a process whose context is gone."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        os._exit(3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build-gpu/results"))
    args = parser.parse_args()
    torch.manual_seed(0)
    steps, clock, report = Steps(), Clock(args.device), Report(args.out)
    report.line(f"{quire.cuda_state()}; torch {torch.__version__}, cuDNN "
                f"{torch.backends.cudnn.version()}")  # fmt: skip
    roofs = ceilings(clock, args.device)
    report.line(f"copy {roofs[0] * 1e-12:.3f} TB/s (read + written), gemm {roofs[1] * 1e-12:.0f} "
                "TFLOP/s; %: of these; x: time over quire's")  # fmt: skip
    pairs = [prefills(args.device), decodes(args.device)]
    cases = [case for both in zip(*pairs, strict=False) for case in both]
    cases += [case for group in pairs for case in group[len(min(pairs, key=len)) :]]
    runs = {
        "plans": lambda: plans(clock, args.device, report),
        "small operations": lambda: small_operations(clock, args.device, report, roofs[0]),
    }
    runs |= {str(c): lambda c=c: run_case(clock, c, report, roofs) for c in cases}
    for name, run in runs.items():
        if not steps.begin(name):
            continue
        try:
            run()
        except Exception as error:  # the next one may work
            report.wrong(name, f"FAILED: {type(error).__name__}: {error}")
            leave_if_dead(args.device)
        if args.device == "cuda":
            torch.cuda.empty_cache()
            time.sleep(0.5)  # heavy cases heat the chip
    steps.done()
    return int(not report.is_content)


if __name__ == "__main__":
    sys.exit(main())
