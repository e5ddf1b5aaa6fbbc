# SPDX-License-Identifier: Apache-2.0
"""quire.integrations.torch: gradients against torch's own attention, and against its steps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from quire.integrations.torch import attention

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_agree_with_sdpa(dtype, causal):
    q, k, v = leaves((2, 130, 8, 64), (2, 130, 2, 64), (2, 130, 2, 64), dtype=dtype)
    dout = torch.randn(q.shape).to(dtype)
    ours = torch.autograd.grad(attention(q, k, v, causal=causal), (q, k, v), dout)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected_out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in wide), is_causal=causal, enable_gqa=True
    )
    theirs = torch.autograd.grad(expected_out.transpose(1, 2), wide, dout.float())
    for x, got, expected in zip((q, k, v), ours, theirs, strict=True):
        assert got.dtype == dtype and got.shape == x.shape
        bound = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
        assert (got.float() - expected).abs().max() < bound


def composed(q, k, v, sinks, slopes, softcap, causal) -> torch.Tensor:
    """Attention out of single torch operations, [seq, heads, dim]; autograd knows the rest."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    x = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    x = softcap * torch.tanh(x / softcap)
    ahead = torch.arange(len(k))[None] - (torch.arange(len(q))[:, None] + len(k) - len(q))
    x = x - slopes[:, None, None] * ahead.abs()
    if causal:
        x = x.masked_fill(ahead > 0, -torch.inf)
    x = torch.cat([x, sinks[:, None, None].expand(-1, len(q), 1)], dim=2)
    return torch.einsum("hij,jhd->ihd", x.softmax(dim=2)[..., :-1], v)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_every_option_agree_with_autograd(causal):
    q, k, v, sinks = leaves((70, 4, 40), (111, 2, 40), (111, 2, 24), (4,))
    slopes = torch.rand(4)
    dout = torch.randn(70, 4, 24)
    cu_q, cu_k = torch.tensor([0, 70]).int(), torch.tensor([0, 111]).int()
    out = attention(
        q,
        k,
        v,
        causal=causal,
        softcap=3.0,
        alibi_slopes=slopes,
        sinks=sinks,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
    )
    ours = torch.autograd.grad(out, (q, k, v, sinks), dout)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    expected = composed(*wide, slopes.double(), 3.0, causal)
    theirs = torch.autograd.grad(expected, wide, dout.double())
    assert (out - expected).abs().max() < 2e-6
    for got, want in zip(ours, theirs, strict=True):
        assert (got - want).abs().max() < 4e-6 * max(1.0, want.abs().max().item())


@pytest.mark.filterwarnings("ignore:Input .* not a double precision")
def test_gradcheck_in_steps_of_float32():
    """torch's own check; its steps must be coarse, as all is computed in float32."""
    inputs = leaves((1, 5, 2, 8), (1, 7, 1, 8), (1, 7, 1, 8), (2,))

    def call(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, causal=True, window=(4, 0))

    assert torch.autograd.gradcheck(call, inputs, eps=1e-2, atol=5e-3, rtol=1e-2)


def test_backward_through_a_loss_and_lse_without_gradient():
    q, k, v = leaves((1, 9, 2, 16), (1, 9, 2, 16), (1, 9, 2, 16))
    out, lse = attention(q, k, v, return_lse=True)
    assert out.requires_grad and not lse.requires_grad
    out.sum().backward()  # the gradient of out is an expanded scalar
    assert q.grad is not None and torch.isfinite(q.grad).all()
    assert torch.allclose(v.grad.sum(), torch.tensor(9.0 * 2 * 16), atol=1e-3)
    assert not attention(q.detach(), k.detach(), v.detach()).requires_grad


def test_gradients_of_gradients_are_refused():
    q, k, v = leaves((1, 4, 1, 8), (1, 4, 1, 8), (1, 4, 1, 8))
    (dq,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_quire_alone_imports_no_integration():
    code = "import quire, sys; sys.exit(any('integrations' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
