# SPDX-License-Identifier: Apache-2.0
"""One small call of every kind of kernel, for compute-sanitizer to look at, or for steps.py to see
which of them come back. Each is named first and waited for.

python tests/bench/gpu/sanitize.py cuda|cpu"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import quire
import torch
from steps import Steps

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("device", choices=("cuda", "cpu"), nargs="?", default="cuda")
DEVICE = parser.parse_args().device
OPTIONS = {"softcap": 20.0, "window": (200, 0)}
LENGTHS = [(1, 40), (1, 1500), (16, 100), (140, 140)]  # decode, a split sequence, two prompts
BLOCKS = [-(-s // 16) for _, s in LENGTHS]


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def attend(dtype: torch.dtype, heads: int, k: torch.Tensor, v: torch.Tensor, options: dict) -> None:
    """All lengths in one batch."""
    table = np.full((len(LENGTHS), max(BLOCKS)), -1, np.int32)
    ids = iter(np.random.default_rng(0).permutation(sum(BLOCKS)))
    for b, count in enumerate(BLOCKS):
        table[b, :count] = [next(ids) for _ in range(count)]
    q = random(dtype, sum(n for n, _ in LENGTHS), heads, k.shape[-1])
    cu = np.cumsum([0, *(n for n, _ in LENGTHS)], dtype=np.int32)
    seq_lens = np.array([s for _, s in LENGTHS], np.int32)
    out, lse = quire.paged_attention(
        q, k, v, table, seq_lens, cu_seqlens_q=cu, return_lse=True, **options
    )
    assert torch.isfinite(out.float()).all() and torch.isfinite(lse).all()
    if DEVICE == "cuda" and not options and k.shape == v.shape:
        planned_on_the_device(q, k, v, (table, seq_lens, cu), out)


def planned_on_the_device(q, k, v, arrays, expected) -> None:
    """The same, planned by the GPU."""
    print("  planned on the device", flush=True)
    attn = quire.Attention(
        num_heads=q.shape[1], num_kv_heads=k.shape[2], head_dim=k.shape[3], device=DEVICE,
        kv_dtype="float8_e4m3" if k.dtype == torch.float8_e4m3fn else None,
        dtype=str(q.dtype).removeprefix("torch."),
    )  # fmt: skip
    plan = attn.plan(*(torch.from_numpy(x).to(DEVICE) for x in arrays), max_total_q=len(q))
    assert torch.equal(attn.run(plan, q, k, v), expected)


def shapes(dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(heads, k, v) of every head dim and type of cache."""
    blocks = sum(BLOCKS)
    for head_dim in (64, 96, 128, 192, 256):
        for kv_dtype in (dtype, torch.float8_e4m3fn):
            yield 8, *random(kv_dtype, 2, blocks, 16, 2, head_dim)
    # Latent attention as prompts have it, and as it is decoded.
    yield 8, random(dtype, blocks, 16, 8, 192), random(dtype, blocks, 16, 8, 128)
    latent = random(dtype, blocks, 16, 1, 576)
    for heads in (16, 128):
        yield heads, latent, latent[..., :512]


def cache_operations(dtype: torch.dtype) -> None:
    cache = torch.zeros(2, 8, 16, 2, 64, device=DEVICE, dtype=dtype)
    k = torch.randn(20, 2, 64, device=DEVICE).to(dtype)
    rope = quire.Rope(torch.randn(50, 64, device=DEVICE), np.arange(20, dtype=np.int32))
    quire.append_kv(k, k, cache[0], cache[1], np.arange(20), rope=rope)
    quire.apply_rope(k, rope)
    codes = torch.zeros(2, 8, 16, 2, 64, device=DEVICE).to(torch.float8_e4m3fn)
    scales = torch.zeros(2, 8, 16, 2, device=DEVICE)
    quire.append_kv(k, k, *codes, np.arange(20), rope=rope, k_scale=scales[0], v_scale=scales[1])
    quire.copy_blocks(cache[0], cache[1], np.array([[0, 5], [1, 6]], np.int32))
    outs, lses = torch.randn(3, 20, 2, 64, device=DEVICE).to(dtype), torch.randn(3, 2, 20)
    quire.merge_states(outs, lses.to(DEVICE))


def run(steps: Steps, name: str, call: Callable[[], None]) -> None:
    if not steps.begin(name):
        return
    print(name, flush=True)
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    torch.manual_seed(0)
    steps = Steps()
    for dtype in (torch.float16, torch.bfloat16):
        run(steps, f"operations on caches of {dtype}", lambda d=dtype: cache_operations(d))
        for options in ({}, OPTIONS):
            for heads, k, v in shapes(dtype):
                name = f"attention {dtype} over {k.dtype}, {heads} heads, head dims {k.shape[-1]}"
                arguments = (dtype, heads, k, v, options)
                run(steps, f"{name} and {v.shape[-1]}, {options}", lambda a=arguments: attend(*a))
    codes = random(torch.float8_e4m3fn, 2, sum(BLOCKS), 16, 2, 128)
    name = "attention of queries of float8_e4m3fn, 8 heads, head dims 128"
    run(steps, name, lambda: attend(codes.dtype, 8, *codes, {"sinks": torch.zeros(8).to(DEVICE)}))
    steps.done()
    print("the last kernel has run")


if __name__ == "__main__":
    main()
