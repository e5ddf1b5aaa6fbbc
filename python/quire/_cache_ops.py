# SPDX-License-Identifier: Apache-2.0
"""The operations on caches: documentation and outputs over the bindings in `_core`; see `_ops`."""

from __future__ import annotations

from dataclasses import dataclass

from ._arrays import Tensor, empty, shape_of
from ._frameworks import functional_in_jax, kernels


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding of one step's tokens, for `append_kv` (keys) and `apply_rope`.

    Pair i of the first ``rotary_dim`` elements of a head, ``(i, i + rotary_dim / 2)`` or, where
    interleaved, ``(2 i, 2 i + 1)``, is turned by angle i of the token's position. The elements
    beyond ``rotary_dim`` stay as they are.

    Args:
        cos_sin: float32 ``[max_position, rotary_dim]``: the cosines of a position's angles in the
            first half of its row, their sines in the second; rotary_dim even, at most head_dim.
        positions: int32 ``[num_tokens]``, rows of `cos_sin` in any order.
        interleaved: neighbours are pairs (GPT-J's style), not the two halves (GPT-NeoX's).

    Example::

        angles = numpy.outer(numpy.arange(4096), 10000.0 ** -(numpy.arange(0, 64, 2) / 64))
        cos_sin = numpy.hstack([numpy.cos(angles), numpy.sin(angles)]).astype("float32")
        rope = quire.Rope(cos_sin, positions)

    Source: Su et al., RoFormer (2021).
    """

    cos_sin: Tensor
    positions: Tensor
    interleaved: bool = False


def _check_rope(function: str, rope: object) -> None:
    if not isinstance(rope, Rope):
        raise TypeError(f"{function}: rope: expected a quire.Rope, got {type(rope).__name__}")
    if not isinstance(rope.interleaved, bool):
        raise TypeError(
            f"{function}: rope.interleaved: expected a bool, got {type(rope.interleaved).__name__}"
        )


@functional_in_jax
def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    rope: Rope | None = None,
    k_scale: float | Tensor = 1.0,
    v_scale: float | Tensor = 1.0,
    stream: object = None,
) -> None:
    """Write new tokens' keys and values into their slots of the paged cache.

    k ``[num_tokens, num_kv_heads, head_dim]``, v likewise, caches as for `paged_attention`, all of
    one dtype; slot_mapping int64 ``[num_tokens]``: ``block * block_size + offset``, and -1 skips
    a token. `rope` turns the keys on their way, in float32 and rounded once; v stays as it is.
    On a GPU slot_mapping and positions may lie beside the cache or on the CPU; beside the cache
    their values are not checked, and tokens whose slot or position is out of range are skipped.
    `stream` as for `paged_attention`.

    A quantised cache takes k and v of any float dtype, each element divided by its scale in
    float32, rounded to nearest even and bounded by the largest finite one (448, 57344, 127). NaN
    stays NaN in float8 and becomes 0 in int8.

    Args:
        k: new keys.
        v: new values.
        k_cache: where the keys go.
        v_cache: where the values go.
        slot_mapping: where each token goes.
        rope: see `Rope`; None leaves the keys as they are.
        k_scale: as for `paged_attention`; but one a token and head is written, not read: the
            largest magnitude of the token's head over the largest finite element.
        v_scale: likewise.
        stream: CUDA stream; None on the CPU.

    Raises:
        ValueError: an argument is wrong (a slot or position out of range too); nothing has been
            written.
        TypeError: `rope` is no `Rope`, or an argument is no tensor.

    Example::

        rope = quire.Rope(cos_sin, positions)
        quire.append_kv(k, v, cache.k(layer), cache.v(layer), batch.slot_mapping, rope=rope)
    """
    if rope is not None:
        _check_rope("append_kv", rope)
    kernels().append_kv(k, v, k_cache, v_cache, slot_mapping, rope, k_scale, v_scale, stream)


@functional_in_jax
def apply_rope(x: Tensor, rope: Rope, *, out: Tensor | None = None) -> Tensor:
    """Turn queries as `append_kv` turns keys: x ``[num_tokens, heads, head_dim]`` -> out.

    float32, float16 or bfloat16, any strides with the last dimension contiguous; in float32,
    rounded once. `out` is x itself, other memory, or None for a new array.

    Raises:
        ValueError: an argument is wrong (a position out of range too); nothing has been written.
        TypeError: `rope` is no `Rope`, or an argument is no tensor.

    Example::

        quire.apply_rope(q, rope, out=q)
    """
    _check_rope("apply_rope", rope)
    if out is None:
        out = empty(x, "apply_rope: x", shape_of(x, "apply_rope: x"))
    kernels().apply_rope(x, rope, out)
    return out


@functional_in_jax
def copy_blocks(k_cache: Tensor, v_cache: Tensor, src_dst: Tensor) -> None:
    """Copy whole blocks inside a cache: src_dst int32 ``[n, 2]``.

    No block may be both source and destination, or a destination twice. Scales a token and head
    are copied as caches of their own: ``copy_blocks(k_scale[..., None], v_scale[..., None], ...)``.

    Raises:
        ValueError: an argument is wrong; nothing has been copied.

    Example::

        quire.copy_blocks(cache.k(layer), cache.v(layer), batch.copies)
    """
    kernels().copy_blocks(k_cache, v_cache, src_dst)


def swap_blocks(src: Tensor, dst: Tensor, src_dst: Tensor) -> None:
    """Copy whole blocks from one cache to another, out of a pool or back into it.

    src, dst ``[num_blocks, block_size, num_kv_heads, head_dim]`` of one dtype, with blocks of one
    shape, any strides and any number of blocks each; src_dst int32 ``[n, 2]``: block
    ``src_dst[i, 0]`` of src becomes block ``src_dst[i, 1]`` of dst. No block may be a destination
    twice, and src and dst may not share memory. One may be on a GPU and the other in pinned memory.

    Raises:
        ValueError: an argument is wrong; nothing has been copied.

    Example::

        quire.swap_blocks(cache.k(layer), host_cache.k(layer), numpy.array([[3, 0]], "int32"))
    """
    kernels().swap_blocks(src, dst, src_dst)
