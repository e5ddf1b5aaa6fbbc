# SPDX-License-Identifier: Apache-2.0
"""The gradients of attention: defaults, outputs and documentation over the binding in `_core`."""

from __future__ import annotations

from . import _core
from ._arrays import Tensor, empty, shape_of
from ._options import is_tree, refuse_wrong_type


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    mask_kind: str = "full",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of `attention`, dense or ragged: (dq, dk, dv), and dsinks where sinks are given.

    q, k, v and all options are those of the call of `attention`, out and lse what it returned with
    ``return_lse=True``. Nothing of its size [seq_q, seq_k] was kept: the probabilities are computed
    again, tile by tile, from q, k and lse. On the CPU.

    Args:
        dout: gradient of out, of its shape and dtype.
        q: queries, dense ``[batch, seq_q, num_heads, head_dim]``, ragged
            ``[total_q, num_heads, head_dim]``; float32, float16 or bfloat16.
        k: keys, dense ``[batch, seq_k, num_kv_heads, head_dim]``, ragged ``[total_k, ...]``.
        v: values, likewise, ``head_dim_v`` wide.
        out: as `attention` returned it.
        lse: likewise; float32, dense ``[batch, num_heads, seq_q]``, ragged
            ``[num_heads, total_q]``.
        causal: see `attention`; likewise for the options that follow.
        window: see `attention`.
        scale: see `attention`.
        softcap: see `attention`.
        alibi_slopes: see `attention`; has no gradient here.
        sinks: see `attention`.
        mask: see `attention`.
        mask_kind: see `attention`.
        cu_seqlens_q: see `attention`.
        cu_seqlens_k: see `attention`.

    Returns:
        dq, dk and dv, of the shapes and dtype of q, k and v, in the framework of `q`; sums are in
        float32. With sinks also dsinks, float32 ``[num_heads]``. Rows with no visible key and keys
        that no row sees have gradients of 0. The bits of dq, dk and dv of a sequence depend on that
        sequence only, not on the number of threads.

    Raises:
        ValueError: an argument is wrong; the message names it. Nothing has been written.
        TypeError: an argument is no tensor.
        NotImplementedError: no kernel for this combination; the message says why.

    Example::

        out, lse = quire.attention(q, k, v, causal=True, return_lse=True)
        dq, dk, dv = quire.attention_backward(dout, q, k, v, out, lse, causal=True)

    Source: Dao, FlashAttention-2 (2023), algorithm 2.
    """
    mask_is_tree = is_tree("attention_backward", mask_kind) and mask is not None
    dq, dk, dv = (
        empty(q, "attention_backward: q", shape_of(x, f"attention_backward: {name}"))
        for name, x in (("q", q), ("k", k), ("v", v))
    )
    dsinks = None
    if sinks is not None:
        dsinks = empty(
            q, "attention_backward: q", shape_of(sinks, "attention_backward: sinks"), "float32"
        )
    try:
        _core.attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            dsinks,
            causal,
            window,
            scale,
            softcap,
            alibi_slopes,
            sinks,
            mask,
            mask_is_tree,
            cu_seqlens_q,
            cu_seqlens_k,
        )
    except TypeError:
        refuse_wrong_type("attention_backward", causal, window, scale, softcap)
        raise
    return (dq, dk, dv) if dsinks is None else (dq, dk, dv, dsinks)
