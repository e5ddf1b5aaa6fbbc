# SPDX-License-Identifier: Apache-2.0
"""quire's operations on JAX arrays, eager and under jit, vmap and scan, through XLA's FFI.

`quire.attention` and its companions come here by themselves when their first argument is a JAX
array or a tracer. JAX arrays can't be written to, so `append_kv` and `copy_blocks` return the
caches. Donate them, and XLA updates them where they are::

    @functools.partial(jax.jit, donate_argnums=(3, 4))
    def layer(q, k, v, k_cache, v_cache, slots, table, seq_lens):
        k_cache, v_cache = quire.append_kv(k, v, k_cache, v_cache, slots)
        return quire.paged_attention(q, k_cache, v_cache, table, seq_lens), k_cache, v_cache

Without donation XLA copies the caches first, and the result is the same. Caches are dense
``[num_blocks, block_size, num_kv_heads, head_dim]``; slot_mapping may be int32, which is what JAX
has by default. A wrong shape or dtype is refused by name, at the latest when the call runs (as
`jax.errors.JaxRuntimeError`). On the CPU only; no gradients yet: `jax.grad` raises.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from .. import _jax
except ImportError as error:
    raise ImportError(
        "quire.integrations.jax: expected the module quire._jax, which this installation lacks: "
        "it is built where jaxlib is installed (pip install --no-build-isolation) or with "
        "QUIRE_JAX=1 in the environment of pip"
    ) from error

from .._options import is_tree, refuse_wrong_type

Array = Any

for _name, _handler in _jax.handlers().items():
    jax.ffi.register_ffi_target(f"quire_{_name}", _handler, platform="cpu")


def _shape(function: str, name: str, array: Array, ndim: int) -> tuple[int, ...]:
    shape: tuple[int, ...] = tuple(array.shape)
    if len(shape) != ndim:
        raise ValueError(f"{function}: {name}: expected {ndim} dimensions, got {shape}")
    return shape


def _call(
    function: str,
    operands: dict[str, Array | None],
    results: list[tuple[tuple[int, ...], Any]],
    updated: tuple[str, ...] = (),
    **attributes: Any,
) -> Any:
    """Calls a handler; result i is operand `updated[i]`, written in place."""
    given = {name: jnp.asarray(array) for name, array in operands.items() if array is not None}
    names = list(given)
    call = jax.ffi.ffi_call(
        f"quire_{function}",
        [jax.ShapeDtypeStruct(*result) for result in results],
        # What is written needs memory of its own in each instance; what is only read does not.
        vmap_method="broadcast_all" if updated else "expand_dims",
        input_output_aliases={names.index(name): i for i, name in enumerate(updated)},
    )
    rank = np.int32(given[names[0]].ndim)
    return call(*given.values(), operands=",".join(names), rank=rank, **attributes)


def _options(
    function: str,
    causal: bool,
    window: tuple[int, int],
    scale: float | None,
    softcap: float,
    mask_kind: str,
) -> dict[str, Any]:
    mask_is_tree = is_tree(function, mask_kind)
    try:
        left, right = (np.int32(side) for side in window)
        options = {
            "causal": np.bool_(causal),
            "window_left": left,
            "window_right": right,
            "scale": np.float32(scale or 0.0),
            "softcap": np.float32(softcap),
            "mask_is_tree": np.bool_(mask_is_tree),
        }
    except (TypeError, ValueError, OverflowError):
        refuse_wrong_type(function, causal, window, scale, softcap)
        raise
    if scale == 0:
        raise ValueError(f"{function}: scale: expected a number other than 0, got {scale}")
    return options


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    mask: Array | None = None,
    mask_kind: str = "full",
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """`quire.attention` on JAX arrays: the same shapes, dtypes, options and results.

    Options that are no arrays are constants of a trace.

    Example::

        out = jax.jit(functools.partial(quire.attention, causal=True))(q, k, v)
    """
    ndim = 4 if cu_seqlens_q is None and cu_seqlens_k is None else 3
    shape = _shape("attention", "q", q, ndim)
    dim_v = _shape("attention", "v", v, ndim)[-1]
    operands = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes, "sinks": sinks}
    operands |= {"mask": mask, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    options = _options("attention", causal, window, scale, softcap, mask_kind)
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    results = [((*shape[:-1], dim_v), q.dtype), (lse_shape, np.float32)]
    out, lse = _call("attention", operands, results, **options)
    return (out, lse) if return_lse else out


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    seq_lens: Array,
    *,
    cu_seqlens_q: Array | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    mask: Array | None = None,
    mask_kind: str = "full",
    return_lse: bool = False,
) -> Any:
    """`quire.paged_attention` on JAX arrays: the same shapes, dtypes, options and results.

    Lengths and tables are operands: a step of other lengths and equal shapes compiles nothing.

    Example::

        out = quire.paged_attention(q, k_cache, v_cache, block_table, seq_lens)
    """
    total_q, num_heads, _ = _shape("paged_attention", "q", q, 3)
    dim_v = _shape("paged_attention", "v_cache", v_cache, 4)[-1]
    operands = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "block_table": block_table}
    operands |= {"seq_lens": seq_lens, "cu_seqlens_q": cu_seqlens_q, "mask": mask}
    operands |= {"alibi_slopes": alibi_slopes, "sinks": sinks}
    options = _options("paged_attention", causal, window, scale, softcap, mask_kind)
    results = [((total_q, num_heads, dim_v), q.dtype), ((num_heads, total_q), np.float32)]
    out, lse = _call("paged_attention", operands, results, **options)
    return (out, lse) if return_lse else out


def append_kv(
    k: Array,
    v: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    rope: Any = None,
) -> tuple[Array, Array]:
    """`quire.append_kv` on JAX arrays: returns (k_cache, v_cache) with the new tokens in them.

    Example::

        k_cache, v_cache = quire.append_kv(k, v, k_cache, v_cache, slots)
    """
    operands = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    operands |= {"slot_mapping": slot_mapping}
    interleaved = False
    if rope is not None:
        operands |= {"rope.cos_sin": rope.cos_sin, "rope.positions": rope.positions}
        interleaved = rope.interleaved
    results = [(tuple(cache.shape), cache.dtype) for cache in (k_cache, v_cache)]
    updated = ("k_cache", "v_cache")
    caches = _call("append_kv", operands, results, updated, interleaved=np.bool_(interleaved))
    return caches[0], caches[1]


def apply_rope(x: Array, rope: Any) -> Array:
    """`quire.apply_rope` on a JAX array: returns the turned one.

    Example::

        q = quire.apply_rope(q, rope)
    """
    operands = {"x": x, "rope.cos_sin": rope.cos_sin, "rope.positions": rope.positions}
    interleaved = np.bool_(rope.interleaved)
    return _call("apply_rope", operands, [(tuple(x.shape), x.dtype)], interleaved=interleaved)[0]


def copy_blocks(k_cache: Array, v_cache: Array, src_dst: Array) -> tuple[Array, Array]:
    """`quire.copy_blocks` on JAX arrays: returns (k_cache, v_cache) with the copies made.

    Example::

        k_cache, v_cache = quire.copy_blocks(k_cache, v_cache, src_dst)
    """
    operands = {"k_cache": k_cache, "v_cache": v_cache, "src_dst": src_dst}
    results = [(tuple(cache.shape), cache.dtype) for cache in (k_cache, v_cache)]
    caches = _call("copy_blocks", operands, results, ("k_cache", "v_cache"))
    return caches[0], caches[1]


def merge_states(outs: Array | list[Array], lses: Array | list[Array]) -> tuple[Array, Array]:
    """`quire.merge_states` on JAX arrays.

    Example::

        out, lse = quire.merge_states([out_a, out_b], [lse_a, lse_b])
    """
    outs, lses = jnp.asarray(outs), jnp.asarray(lses)
    _, total_q, num_heads, head_dim = _shape("merge_states", "outs", outs, 4)
    results = [((total_q, num_heads, head_dim), outs.dtype), ((num_heads, total_q), np.float32)]
    out, lse = _call("merge_states", {"outs": outs, "lses": lses}, results)
    return out, lse
