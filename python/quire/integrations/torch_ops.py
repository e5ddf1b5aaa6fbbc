# SPDX-License-Identifier: Apache-2.0
"""quire's operations as torch operators `torch.ops.quire.*`, for torch.compile and torch.export.

Nobody has to import this: inside a compiled function `quire.attention` and its companions become
these operators by themselves, and the graph stays whole::

    @torch.compile(fullgraph=True)
    def layer(q, k, v, cache_k, cache_v, slots, table, seq_lens):
        quire.append_kv(k, v, cache_k, cache_v, slots)           # writes into the cache's memory
        return quire.paged_attention(q, cache_k, cache_v, table, seq_lens) * 2

Each operator writes into tensors that it is given and says so in its schema, so the compiler keeps
the order of writes and reads and adds no copy where it can see that none is needed. Outside a
compiled function the bindings are called directly, which is faster by the way through torch's
dispatcher. Gradients do not flow through: see `quire.integrations` for what does.

The functions here have the signatures of `quire._core`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _core

Tensor = Any

_OPTIONS = (
    "bool causal, int[] window, float? scale, float softcap, Tensor? alibi_slopes, "
    "Tensor? sinks, Tensor? mask, bool mask_is_tree"
)
_ROPE = "Tensor? cos_sin, Tensor? positions, bool interleaved"
_SCHEMAS = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, "
    f"{_OPTIONS}, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> ()",
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    f"Tensor seq_lens, Tensor(a!) out, Tensor(b!)? lse, Tensor? cu_seqlens_q, {_OPTIONS}, "
    "float k_scale, Tensor? k_scales, float v_scale, Tensor? v_scales) -> ()",
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
    f"{_ROPE}, float k_scale, Tensor(c!)? k_scales, float v_scale, Tensor(d!)? v_scales) -> ()",
    f"apply_rope(Tensor x, {_ROPE}, Tensor(a!) out) -> ()",
    "copy_blocks(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor src_dst) -> ()",
    "swap_blocks(Tensor src, Tensor(a!) dst, Tensor src_dst) -> ()",
    "merge_states(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!) lse) -> ()",
)


class _Rope:
    """What `_core` reads of a quire.Rope."""

    def __init__(self, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> None:
        self.cos_sin, self.positions, self.interleaved = cos_sin, positions, interleaved


def _run_append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor | None,
    interleaved: bool,
    *scales: Any,
) -> None:
    rope = None if cos_sin is None else _Rope(cos_sin, positions, interleaved)
    _core.append_kv(k, v, k_cache, v_cache, slot_mapping, rope, *_join_scales(*scales))


def _run_paged_attention(*args: Any) -> None:
    run: Any = _core.paged_attention  # its many arguments pass through uncounted
    run(*args[:-4], *_join_scales(*args[-4:]))


def _join_scales(
    k_scale: float, k_scales: Tensor | None, v_scale: float, v_scales: Tensor | None
) -> tuple[float | Tensor, float | Tensor]:
    return k_scale if k_scales is None else k_scales, v_scale if v_scales is None else v_scales


def _split_scale(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """An operator's argument is a number or a tensor, never either: two arguments for a scale."""
    return (1.0, scale) if isinstance(scale, torch.Tensor) else (scale, None)


def _run_apply_rope(
    x: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool, out: Tensor
) -> None:
    _core.apply_rope(x, _Rope(cos_sin, positions, interleaved), out)


def _fake(schema: str) -> Callable[..., None]:
    """What tracing needs to know of an operator that returns nothing: what it refuses."""
    name, _, arguments = schema.partition("(")
    names = [argument.split()[-1] for argument in arguments.rpartition(") -> ")[0].split(", ")]

    def fake(*arguments: object) -> None:
        for argument, value in zip(names, arguments, strict=False):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise ValueError(
                    f"{name}: {argument}: expected a tensor without gradient, got one that "
                    "requires grad; detach() it"
                )

    return fake


def _define() -> torch.library.Library:
    library = torch.library.Library("quire", "DEF")
    own: dict[str, Callable[..., None]] = {
        "paged_attention": _run_paged_attention,
        "append_kv": _run_append_kv,
        "apply_rope": _run_apply_rope,
    }
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.needs_exact_strides,))
        for device in ("CPU", "CUDA"):
            library.impl(name, own.get(name, getattr(_core, name)), device)
        torch.library.register_fake(f"quire::{name}", _fake(schema), lib=library)
    return library


_LIBRARY = _define()  # the operators live as long as this does

copy_blocks = torch.ops.quire.copy_blocks.default
swap_blocks = torch.ops.quire.swap_blocks.default
merge_states = torch.ops.quire.merge_states.default


def _refuse_stream(name: str, stream: object) -> None:
    if stream is not None:
        raise ValueError(f"{name}: stream: expected None in a compiled function")


def attention(*args: Any) -> None:
    """As `_core.attention`, on torch's current stream."""
    _refuse_stream("attention", args[-1])
    torch.ops.quire.attention.default(*args[:-1])


def paged_attention(*args: Any) -> None:
    """As `_core.paged_attention`: the operator takes a scale as a number and a tensor."""
    *others, k_scale, v_scale, stream = args
    _refuse_stream("paged_attention", stream)
    scales = (*_split_scale(k_scale), *_split_scale(v_scale))
    torch.ops.quire.paged_attention.default(*others, *scales)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    rope: Any,
    k_scale: float | Tensor,
    v_scale: float | Tensor,
    stream: object,
) -> None:
    """As `_core.append_kv`: the operator takes the parts of a rope and of the scales."""
    _refuse_stream("append_kv", stream)
    parts = (None, None, False)
    if rope is not None:
        parts = (rope.cos_sin, rope.positions, rope.interleaved)
    scales = (*_split_scale(k_scale), *_split_scale(v_scale))
    torch.ops.quire.append_kv.default(k, v, k_cache, v_cache, slot_mapping, *parts, *scales)


def apply_rope(x: Tensor, rope: Any, out: Tensor) -> None:
    """As `_core.apply_rope`."""
    torch.ops.quire.apply_rope.default(x, rope.cos_sin, rope.positions, rope.interleaved, out)
