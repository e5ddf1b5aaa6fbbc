# SPDX-License-Identifier: Apache-2.0
"""torch tensors on a GPU: its streams, its graphs, large caches, agreement with its attention."""

from __future__ import annotations

import numpy as np
import pytest
import quire
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_agrees_with_sdpa(dtype, head_dim):
    q = torch.randn(2, 8, 700, head_dim, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 2, 2, 700, head_dim, device="cuda", dtype=dtype)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    out = quire.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    assert out.device == q.device and out.dtype == dtype
    error = (out.transpose(1, 2).float() - expected).abs().max()
    assert error < (2e-3 if dtype == torch.float16 else 2e-2)


def decode_step(batch: int, kv: int):
    attn = quire.Attention(num_heads=8, num_kv_heads=2, head_dim=128, device="cuda")
    blocks = kv // 16
    table = np.random.default_rng(0).permutation(batch * blocks).astype(np.int32)
    table = table.reshape(batch, blocks)
    cache = torch.randn(2, batch * blocks, 16, 2, 128, device="cuda").bfloat16()
    q = torch.randn(batch, 8, 128, device="cuda").bfloat16()
    return attn, table, np.full(batch, kv, np.int32), cache, q


def test_work_follows_the_current_stream():
    attn, table, lens, cache, q = decode_step(4, 4096)
    plan = attn.plan(table, lens)
    expected = attn.run(plan, q, cache[0], cache[1])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        own = cache.clone()  # late: work on another stream would read garbage
        out = attn.run(plan, q, own[0], own[1])
    assert not stream.query()  # the call has not waited
    stream.synchronize()
    assert torch.equal(out, expected)
    given = attn.run(plan, q, cache[0], cache[1], stream=stream)
    stream.synchronize()
    assert torch.equal(given, expected)


def test_a_graph_replays_the_same_bits():
    attn, table, lens, cache, q = decode_step(8, 2048)
    plan = attn.plan(table, lens)
    expected = attn.run(plan, q, cache[0], cache[1])
    k = torch.randn(8, 2, 128, device="cuda").bfloat16()
    slots = torch.arange(8, device="cuda")
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            attn.run(plan, q, cache[0], cache[1], out=out)
        quire.append_kv(k, k, *torch.zeros_like(cache), slots)
    for _ in range(2):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
    assert torch.equal(attn.run(plan, q, cache[0], cache[1]), expected)


def test_caches_beyond_2_31_elements():
    blocks = (2**31 + 2**28) // (16 * 2 * 128)
    cache = torch.empty(blocks, 16, 2, 128, device="cuda", dtype=torch.bfloat16)
    ids = np.array([[blocks - 1, 0, blocks - 2]], np.int32)
    k = torch.randn(40, 2, 128, device="cuda").bfloat16()
    slots = (ids[0].astype(np.int64)[:, None] * 16 + np.arange(16)).ravel()[:40]
    quire.append_kv(k, k, cache, cache, slots)
    q = torch.randn(1, 4, 128, device="cuda").bfloat16()
    out = quire.paged_attention(q, cache, cache, ids, np.array([40], np.int32))
    small = quire.attention(q[None], k[None], k[None], causal=True)
    assert torch.equal(out, small[0])


def test_many_threads_and_streams():
    from concurrent.futures import ThreadPoolExecutor

    attn, table, lens, cache, q = decode_step(4, 2048)
    expected = attn.run(attn.plan(table, lens), q, cache[0], cache[1])
    torch.cuda.synchronize()

    def work(_: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [attn.run(attn.plan(table, lens), q, cache[0], cache[1]) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
            return all(torch.equal(out, expected) for out in outs)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))
