# SPDX-License-Identifier: Apache-2.0
"""One small call of every kind of kernel, for compute-sanitizer to look at. Each is named first and
waited for, so that one which hangs is the last one named.

python tests/bench/gpu/sanitize.py cuda|cpu"""

from __future__ import annotations

import argparse

import numpy as np
import quire
import torch

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
    print(
        f"attention {dtype} over {k.dtype}, {heads} heads, head dims {k.shape[-1]} and "
        f"{v.shape[-1]}, {options}",
        flush=True,
    )
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


def attend_all(dtype: torch.dtype, options: dict) -> None:
    """Every head dim and type of cache."""
    for head_dim in (64, 96, 128, 192, 256):
        for kv_dtype in (dtype, torch.float8_e4m3fn):
            attend(dtype, 8, *random(kv_dtype, 2, sum(BLOCKS), 16, 2, head_dim), options)
    k = random(dtype, sum(BLOCKS), 16, 8, 192)  # latent attention as prompts have it
    attend(dtype, 8, k, random(dtype, sum(BLOCKS), 16, 8, 128), options)
    latent = random(dtype, sum(BLOCKS), 16, 1, 576)  # and as it is decoded
    for heads in (16, 128):
        attend(dtype, heads, latent, latent[..., :512], options)


def cache_operations(dtype: torch.dtype) -> None:
    print(f"operations on caches of {dtype}", flush=True)
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


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        cache_operations(dtype)
        attend_all(dtype, {})
        attend_all(dtype, OPTIONS)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()
