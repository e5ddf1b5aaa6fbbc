# SPDX-License-Identifier: Apache-2.0
"""transformers' attention function over quire's kernels, and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

import quire

from .cache import IMPLEMENTATION, LAYER
from .continuous import attend_continuous
from .managed_cache import install

_REPLACED = "_quire_replaced_attention"  # on a config: the implementation before enable()


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` compute its attention with quire; returns the model.

    Raises:
        NotImplementedError: the model's attention does not go through the attention interface, or
            the model is not on the CPU.

    Example::

        enable(model)
        model.generate(**inputs)
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise NotImplementedError(
            f"enable: model: expected one that supports transformers' attention interface, got "
            f"{type(model).__name__}"
        )
    if model.device.type != "cpu":
        raise NotImplementedError(f"enable: model: expected one on the CPU, got {model.device}")
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, flash_attention_mask)
    install()
    config = model.config
    if config._attn_implementation != IMPLEMENTATION:
        setattr(config, _REPLACED, config._attn_implementation)
        # set_attn_implementation() would look for a kernel of this name on a server.
        config._attn_implementation = IMPLEMENTATION
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable`; returns the model. One that was never enabled stays as it is.

    Example::

        disable(model)
    """
    config = model.config
    if config._attn_implementation == IMPLEMENTATION:
        config._attn_implementation = getattr(config, _REPLACED)
        delattr(config, _REPLACED)
    return model


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' attention interface defines it.

    query ``[batch, num_heads, seq_q, head_dim]``; key, value ``[batch, num_kv_heads, seq_k, ...]``;
    attention_mask None or ``[batch, seq_k]``, nonzero where there is a token. Returns
    ``([batch, seq_q, num_heads, head_dim_v], None)``; rows of padding are 0.
    """
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        raise NotImplementedError("quire: expected a call under torch.no_grad(); no gradients here")
    if dropout:
        raise NotImplementedError(f"quire: dropout: expected 0, got {dropout}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {
        "causal": causal,
        "window": (sliding_window - 1, -1 if causal else sliding_window - 1)
        if sliding_window
        else (-1, -1),
        "softcap": softcap or 0.0,
        "scale": scaling,
        "sinks": None if s_aux is None else s_aux.detach().float(),
    }
    q, k, v = (_rows_of_heads(x) for x in (query, key, value))
    out: Any
    if cache is not None:
        out = attend_continuous(module.layer_idx, q[0], k[0], v[0], cache, kwargs, options)[None]
    elif (layer := getattr(key, LAYER, None)) is not None:
        out = layer.attend(q, k, v, attention_mask, options)
    elif attention_mask is not None:
        out = _attend_padded(q, k, v, attention_mask.bool(), options)
    else:
        out = quire.attention(q, k, v, **options)
    return out, None


def _rows_of_heads(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, seq, dim] as [batch, seq, heads, dim] with dim contiguous."""
    x = x.detach().transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _attend_padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Packs the rows that hold tokens, so that padding is neither read nor computed."""
    q_mask = mask[:, -q.shape[1] :]
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    rows: Any = quire.attention(
        q[q_mask],
        k[mask],
        v[mask],
        cu_seqlens_q=_cu_seqlens(q_mask),
        cu_seqlens_k=_cu_seqlens(mask),
        **options,
    )
    out[q_mask] = rows
    return out


def _cu_seqlens(mask: torch.Tensor) -> torch.Tensor:
    """Where each sequence's rows begin, int32 [batch + 1], from a mask [batch, seq]."""
    lengths = mask.sum(1, dtype=torch.int32)
    return nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
