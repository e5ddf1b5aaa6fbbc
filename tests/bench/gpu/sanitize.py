# SPDX-License-Identifier: Apache-2.0
"""One small call of every kind of kernel, for compute-sanitizer to look at. Each is named first and
waited for, so that one which hangs is the last one named.

python tests/bench/gpu/sanitize.py cuda|cpu"""

from __future__ import annotations

import sys

import numpy as np
import quire
import torch

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"


def attend(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, options: dict) -> None:
    """Decode, a split sequence, a prompt and a long prompt in one batch."""
    lengths = [(1, 40), (1, 1500), (16, 100), (140, 140)]
    rows = sum(q for q, _ in lengths)
    blocks = [-(-s // 16) for _, s in lengths]
    print(f"attention {dtype} over {kv_dtype}, head dim {head_dim}, {options}", flush=True)
    table = np.full((len(lengths), max(blocks)), -1, np.int32)
    ids = iter(np.random.default_rng(0).permutation(sum(blocks)))
    for b, count in enumerate(blocks):
        table[b, :count] = [next(ids) for _ in range(count)]
    cache = torch.randn(2, sum(blocks), 16, 2, head_dim, device=DEVICE).to(kv_dtype)
    q = torch.randn(rows, 8, head_dim, device=DEVICE).to(dtype)
    cu = np.cumsum([0, *(n for n, _ in lengths)], dtype=np.int32)
    seq_lens = np.array([s for _, s in lengths], np.int32)
    out, lse = quire.paged_attention(
        q, cache[0], cache[1], table, seq_lens, cu_seqlens_q=cu, return_lse=True, **options
    )
    assert torch.isfinite(out.float()).all() and torch.isfinite(lse).all()
    if DEVICE == "cuda" and not options:
        planned_on_the_device(q, cache, torch.from_numpy(table), seq_lens, cu, out)


def planned_on_the_device(q, cache, table, seq_lens, cu, expected) -> None:
    """The same, planned by the GPU."""
    print("  planned on the device", flush=True)
    codes = "float8_e4m3" if cache.dtype == torch.float8_e4m3fn else None
    attn = quire.Attention(
        num_heads=8, num_kv_heads=2, head_dim=q.shape[-1], kv_dtype=codes, device=DEVICE,
        dtype=str(q.dtype).removeprefix("torch."),
    )  # fmt: skip
    arrays = (x.to(DEVICE) for x in (table, torch.from_numpy(seq_lens), torch.from_numpy(cu)))
    plan = attn.plan(*arrays, max_total_q=len(q))
    assert torch.equal(attn.run(plan, q, *cache), expected)


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
        for head_dim in (64, 96, 128, 192, 256):
            for kv_dtype in (dtype, torch.float8_e4m3fn):
                attend(dtype, kv_dtype, head_dim, {})
                attend(dtype, kv_dtype, head_dim, {"softcap": 20.0, "window": (200, 0)})
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()
