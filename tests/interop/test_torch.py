# SPDX-License-Identifier: Apache-2.0
"""torch tensors: no copy, outputs in torch, agreement with torch's own attention."""

from __future__ import annotations

import pytest
import quire
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_dense_agrees_with_sdpa(dtype, causal):
    torch.manual_seed(0)
    q = torch.randn(2, 8, 130, 64).to(dtype)
    k, v = torch.randn(2, 2, 2, 130, 64).to(dtype)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(q.float(), k.float(), v.float(), is_causal=causal, enable_gqa=True)
    out = quire.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
    assert isinstance(out, torch.Tensor) and out.dtype == dtype
    assert (out.transpose(1, 2).float() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_writes_into_torch_memory(dtype):
    torch.manual_seed(1)
    cache = torch.full((6, 2, 2, 16, 32), float("nan"), dtype=dtype)  # head-major pool
    k_cache, v_cache = (cache[:, i].transpose(1, 2) for i in (0, 1))
    k, v = torch.randn(2, 20, 2, 32).to(dtype)
    table = torch.tensor([[4, 1]], dtype=torch.int32)
    slots = torch.tensor([4 * 16 + i for i in range(16)] + [16 + i for i in range(4)])
    quire.append_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(cache[4, 0].transpose(0, 1), k[:16])
    q = torch.randn(1, 4, 32).to(dtype)
    out, lse = quire.paged_attention(
        q, k_cache, v_cache, table, torch.tensor([20], dtype=torch.int32), return_lse=True
    )
    dense, dense_lse = quire.attention(q[None], k[None], v[None], return_lse=True)
    assert torch.equal(out, dense[0]) and torch.equal(lse, dense_lse[0])
    merged, merged_lse = quire.merge_states([out, out], [lse, lse])
    assert torch.equal(merged, out)
    assert torch.allclose(merged_lse, lse + torch.log(torch.tensor(2.0)))


def test_numpy_and_torch_give_the_same_bits():
    q = torch.randn(1, 70, 4, 64)
    assert (
        quire.attention(q.numpy(), q.numpy(), q.numpy()) == quire.attention(q, q, q).numpy()
    ).all()


def test_a_tensor_that_requires_grad_is_refused_by_name():
    q = torch.ones(1, 5, 2, 8)
    with pytest.raises(ValueError, match="attention: k: .*requires grad"):
        quire.attention(q, q.clone().requires_grad_(), q)


def test_torch_is_not_imported_by_quire():
    import subprocess
    import sys

    code = "import quire, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantised_torch_caches(dtype):
    torch.manual_seed(2)
    k_cache, v_cache = torch.zeros(2, 3, 16, 2, 32).to(dtype)
    k_scale, v_scale = torch.zeros(2, 3, 16, 2)
    k, v = torch.randn(2, 40, 2, 32).to(torch.bfloat16)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    quire.append_kv(k, v, k_cache, v_cache, torch.arange(40), **scales)
    q = torch.randn(1, 4, 32).to(torch.bfloat16)
    table, seq_lens = (
        torch.arange(3, dtype=torch.int32)[None],
        torch.tensor([40], dtype=torch.int32),
    )
    out = quire.paged_attention(q, k_cache, v_cache, table, seq_lens, **scales)
    kd, vd = (
        (cache.float() * scale[..., None]).reshape(1, 48, 2, 32)[:, :40]
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
    )
    assert (kd[0] - k.float()).abs().max() < (0.02 if dtype == torch.int8 else 0.3)
    expected = quire.attention(q.float()[None], kd, vd)[0]
    assert (out.float() - expected).abs().max() < TOLERANCE[torch.bfloat16]
