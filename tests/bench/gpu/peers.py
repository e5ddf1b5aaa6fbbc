# SPDX-License-Identifier: Apache-2.0
"""The candidates: quire, and whatever else can be imported and made. Each is a function of a
problem that returns a call, or None where it has nothing for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import quire
import torch
from problems import Decode, Prefill
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

Call = Callable[[int], torch.Tensor] | None


def sdpa_call(backend: SDPBackend, q, sets, **options) -> Call:
    """q, and each set's k and v, are [batch, heads, seq, dim]."""

    def call(i: int) -> torch.Tensor:
        k, v = sets[i % len(sets)]
        with sdpa_kernel(backend):
            return sdpa(q, k, v, enable_gqa=True, **options)

    try:
        call(0)
    except RuntimeError:
        return None
    return call


BACKENDS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def add_peer(calls: dict[str, Call], name: str, module: str, make: Callable[[], Call]) -> None:
    """What is not installed, or installed and broken, is no candidate."""
    if importlib.util.find_spec(module) is None:
        return
    try:
        calls[name] = make()
    except Exception as error:
        print(f"no {name}: {type(error).__name__}: {error}", flush=True)


def prefill_calls(p: Prefill) -> dict[str, Call]:
    """Each call returns out [batch, seq, heads, dim]."""
    q, sets = p.q, p.sets
    out = torch.empty_like(q)
    calls: dict[str, Call] = {
        "quire": lambda i: quire.attention(q, *sets[i % len(sets)], causal=p.causal, out=out)
    }
    attn = quire.Attention(
        num_heads=p.heads, num_kv_heads=p.kv_heads, head_dim=p.dim, dtype="bfloat16",
        causal=p.causal, device=p.device,
    )  # fmt: skip
    blocks = p.seq // 16
    table = np.arange(p.batch * blocks, dtype=np.int32).reshape(p.batch, blocks)
    table = np.random.default_rng(0).permutation(table.ravel()).reshape(table.shape).astype("i4")
    plan = attn.plan(
        table, np.full(p.batch, p.seq, np.int32), np.arange(p.batch + 1, dtype=np.int32) * p.seq
    )
    paged_out = torch.empty_like(q)

    def paged(i: int) -> torch.Tensor:
        k, v = p.paged(i, table)
        attn.run(plan, q.flatten(0, 1), k, v, out=paged_out.flatten(0, 1))
        return paged_out

    calls["quire page 16"] = paged
    heads_first = [tuple(x.transpose(1, 2) for x in s) for s in sets]
    for name, backend in BACKENDS.items():
        call = sdpa_call(backend, q.transpose(1, 2), heads_first, is_causal=p.causal)
        calls[name] = call and (lambda i, call=call: call(i).transpose(1, 2))
    add_peer(calls, "FA3", "flash_attn_interface", lambda: fa3_prefill(p))
    if p.batch == 1:
        add_peer(calls, "FlashInfer", "flashinfer", lambda: flashinfer_prefill(p))
    return {name: call for name, call in calls.items() if call}


def fa3_prefill(p: Prefill) -> Call:
    from flash_attn_interface import flash_attn_func

    def call(i: int) -> torch.Tensor:
        result = flash_attn_func(p.q, *p.sets[i % len(p.sets)], causal=p.causal)
        return result[0] if isinstance(result, tuple) else result

    return call


def flashinfer_prefill(p: Prefill) -> Call:
    from flashinfer import single_prefill_with_kv_cache

    return lambda i: single_prefill_with_kv_cache(
        p.q[0], *(x[0] for x in p.sets[i % len(p.sets)]), causal=p.causal
    )[None]


def decode_calls(p: Decode) -> dict[str, Call]:
    """Each call returns out [batch, heads, dim]."""
    has_floats = p.kv_dtype == torch.bfloat16
    attn = quire.Attention(
        num_heads=p.heads, num_kv_heads=p.kv_heads, head_dim=p.dim, dtype="bfloat16",
        kv_dtype="bfloat16" if has_floats else "float8_e4m3", block_size=p.page, device=p.device,
    )  # fmt: skip
    plan = attn.plan(p.table, p.seq_lens)
    out = torch.empty_like(p.q)

    def run(i: int) -> torch.Tensor:
        return attn.run(plan, p.q, *p.caches[i % len(p.caches)], out=out)

    calls: dict[str, Call] = {"quire": run}
    if p.device == "cuda":
        on_gpu = [torch.from_numpy(x).to(p.device) for x in (p.table, p.seq_lens)]

        def plan_and_run(i: int) -> torch.Tensor:
            return attn.run(attn.plan(*on_gpu), p.q, *p.caches[i % len(p.caches)], out=out)

        calls["quire, plan too"] = plan_and_run
    if p.is_uniform and p.has_room_for_dense and has_floats:
        dense = [p.dense(i) for i in range(len(p.caches))]
        call = sdpa_call(SDPBackend.FLASH_ATTENTION, p.q[:, :, None], dense)
        calls["torch flash, dense"] = call and (lambda i: call(i)[:, :, 0])
    if has_floats:
        add_peer(calls, "FA3", "flash_attn_interface", lambda: fa3_decode(p))
    add_peer(calls, "FlashInfer", "flashinfer", lambda: flashinfer_decode(p))
    return {name: call for name, call in calls.items() if call}


def fa3_decode(p: Decode) -> Call:
    from flash_attn_interface import flash_attn_with_kvcache

    table, lens = (torch.from_numpy(x).to(p.device) for x in (p.table, p.seq_lens))

    def call(i: int) -> torch.Tensor:
        k, v = p.caches[i % len(p.caches)]
        result = flash_attn_with_kvcache(
            p.q[:, None], k, v, cache_seqlens=lens, page_table=table, causal=True
        )
        return (result[0] if isinstance(result, tuple) else result)[:, 0]

    return call


def flashinfer_decode(p: Decode) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    counts = -(-p.seq_lens // p.page)
    indices = np.concatenate([row[:n] for row, n in zip(p.table, counts, strict=True)])
    on_device = [
        torch.from_numpy(x.astype(np.int32)).to(p.device)
        for x in (np.cumsum([0, *counts]), indices, (p.seq_lens - 1) % p.page + 1)
    ]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=p.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        *on_device, p.heads, p.kv_heads, p.dim, p.page,
        q_data_type=torch.bfloat16, kv_data_type=p.kv_dtype,
    )  # fmt: skip
    return lambda i: wrapper.run(p.q, p.caches[i % len(p.caches)])
