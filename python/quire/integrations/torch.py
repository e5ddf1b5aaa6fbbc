# SPDX-License-Identifier: Apache-2.0
"""Attention with gradients for torch: `attention` is `quire.attention` under autograd."""

from __future__ import annotations

from typing import Any

import torch

import quire


def _detached(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if x is None else x.detach() for x in tensors]


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        options: dict[str, Any],
    ) -> Any:
        x, y, z, logits = _detached(q, k, v, sinks)
        out, lse = quire.attention(x, y, z, sinks=logits, return_lse=True, **options)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.options = options
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dout: torch.Tensor, _dlse: torch.Tensor) -> Any:
        dout, q, k, v, sinks, out, lse = _detached(dout, *ctx.saved_tensors)
        if dout.stride(-1) != 1:  # an expanded gradient, as that of sum()
            dout = dout.contiguous()
        gradients = quire.attention_backward(dout, q, k, v, out, lse, sinks=sinks, **ctx.options)
        dq, dk, dv, dsinks = gradients if len(gradients) == 4 else (*gradients, None)
        return dq, dk, dv, dsinks, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    mask_kind: str = "full",
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`quire.attention` for torch tensors, with gradients of q, k, v and sinks.

    Dense q ``[batch, seq_q, num_heads, head_dim]``, k and v ``[batch, seq_k, num_kv_heads, ...]``,
    or ragged with both ``cu_seqlens``; all options are those of `quire.attention`. What is kept for
    the backward pass is q, k, v, out and lse: memory grows with the sequence, not with its square.
    Deterministic: gradients have the same bits in every run. Gradients of gradients are refused.

    Returns:
        ``out``, or ``(out, lse)`` with `return_lse`; lse carries no gradient.

    Raises:
        ValueError: an argument is wrong; the message names it.
        NotImplementedError: no kernel for this combination; the message says why.

    Example::

        from quire.integrations.torch import attention

        q, k, v = (torch.randn(1, 128, 8, 64, requires_grad=True) for _ in range(3))
        attention(q, k, v, causal=True).square().sum().backward()
    """
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "mask": mask,
        "mask_kind": mask_kind,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    apply: Any = _Attention.apply
    out, lse = apply(q, k, v, sinks, options)
    return (out, lse) if return_lse else out
