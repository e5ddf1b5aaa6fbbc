# SPDX-License-Identifier: Apache-2.0
"""The one-shot operations: defaults, outputs and documentation over the bindings in `_core`.

Tensors are NumPy arrays (ml_dtypes' bfloat16 too), torch tensors, or any objects with
`__dlpack__`; nothing is copied. On a GPU the calls return before the work is done and never wait;
block tables and lengths stay on the CPU, where the planner reads them. JAX arrays go another way
and come back new, the caches of `append_kv` and `copy_blocks` too: see `quire.integrations.jax`,
and python/README.md.
"""

from __future__ import annotations

from ._arrays import Tensor, empty, shape_of, stack
from ._frameworks import functional_in_jax, kernels
from ._options import is_tree, refuse_wrong_type


@functional_in_jax
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    stream: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, dense or ragged: softmax(q k^T * scale) v, in one pass over k and v.

    Dense: q ``[batch, seq_q, num_heads, head_dim]``, k ``[batch, seq_k, num_kv_heads, head_dim]``,
    v ``[batch, seq_k, num_kv_heads, head_dim_v]``. Ragged (both ``cu_seqlens`` given): q
    ``[total_q, num_heads, head_dim]``, k and v ``[total_k, num_kv_heads, ...]``; sequence b owns
    rows ``cu_seqlens[b]:cu_seqlens[b + 1]``. float32, float16 or bfloat16; any strides with the
    last dimension contiguous. ``num_kv_heads`` divides ``num_heads`` (grouped-query attention).

    Args:
        q: queries.
        k: keys.
        v: values.
        causal: query i sees keys j <= i + seq_k - seq_q (aligned bottom right).
        window: (left, right): keys further away than that are hidden; inclusive, -1 = open.
        scale: factor of q.k; None is ``1 / sqrt(head_dim)``.
        softcap: s > 0 turns a scaled logit x into ``s * tanh(x / s)``, before the mask.
        alibi_slopes: float32 ``[num_heads]``: adds ``-slope * |i + seq_k - seq_q - j|``.
        sinks: float32 ``[num_heads]``: a logit a head that joins the denominator only.
        mask: uint8, bits packed little-endian, 1 = visible, one row per query
            (``[total_q, bytes]``, dense ``[batch, seq_q, bytes]``), on top of causal and window.
        mask_kind: "full": bit j is key j; "tree": bit j is key ``seq_k - seq_q + j`` and all
            earlier keys are visible (speculative decoding).
        cu_seqlens_q: int32 ``[batch + 1]``, contiguous, from 0.
        cu_seqlens_k: int32 ``[batch + 1]``, likewise.
        return_lse: also return the log of the softmax denominator.
        out: where to write; ``q``'s shape with head_dim_v, ``q``'s dtype; q itself, or memory that
            is none of q, k and v.
        lse: float32, natural log: dense ``[batch, num_heads, seq_q]``, ragged
            ``[num_heads, total_q]``.
        stream: CUDA stream, an int or an object with ``__cuda_stream__``; None is the one that the
            framework of `q` works on. On the CPU only None.

    Returns:
        ``out``, or ``(out, lse)`` with `return_lse`, in the framework of `q`. A row with no
        visible key is 0 with lse = -inf. The bits of a row depend on its own sequence only.

    Raises:
        ValueError: an argument is wrong; the message names it. Nothing has been written.
        TypeError: an argument is no tensor.
        NotImplementedError: no kernel for this combination; the message says why.

    Example::

        q = numpy.random.rand(1, 128, 8, 64).astype("float32")
        k = v = numpy.random.rand(1, 128, 2, 64).astype("float32")
        out = quire.attention(q, k, v, causal=True)

    Source: online softmax and tiling after Dao et al., FlashAttention-2 (2023).
    """
    dense = cu_seqlens_q is None and cu_seqlens_k is None
    shape, v_shape = shape_of(q, "attention: q"), shape_of(v, "attention: v")
    for name, extents in (("q", shape), ("v", v_shape)):
        if len(extents) != (4 if dense else 3):
            raise ValueError(
                f"attention: {name}: expected {4 if dense else 3} dimensions, got {extents}"
            )
    if out is None:
        out = empty(q, "attention: q", (*shape[:-1], v_shape[-1]))
    if lse is None and return_lse:
        lse = empty(q, "attention: q", (*shape[:-3], shape[-2], shape[-3]), "float32")
    mask_is_tree = is_tree("attention", mask_kind) and mask is not None
    try:
        kernels().attention(
            q,
            k,
            v,
            out,
            lse,
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
            stream,
        )
    except TypeError:
        refuse_wrong_type("attention", causal, window, scale, softcap)
        raise
    return (out, lse) if return_lse else out


@functional_in_jax
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    mask_kind: str = "full",
    k_scale: float | Tensor = 1.0,
    v_scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    stream: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a paged KV cache, for any mix of decode and (chunked) prefill rows.

    q ``[total_q, num_heads, head_dim]``; k_cache ``[num_blocks, block_size, num_kv_heads,
    head_dim]`` and v_cache likewise, of any strides with the last dimension contiguous, so NHD and
    HND caches and pools shared by all layers are all views; block_table int32
    ``[batch, max_blocks]``; seq_lens int32 ``[batch]`` counts the new tokens too. The new tokens'
    keys must be in the cache already (`append_kv`). Caches are of q's dtype or quantised:
    float8_e4m3 (ml_dtypes' and torch's float8_e4m3fn), float8_e5m2 or int8, with scales. Over a
    cache of float8_e4m3 queries may be of float8_e4m3, too: their scale is a factor of `scale`, and
    out is bfloat16. On compute capability 9.0, up to head dim 128, both products then are of codes,
    and weights are rounded to float8_e4m3 as well, an error of some 3 % each; the CPU computes with
    the same queries in floats, and other GPUs refuse them. Latent caches hold values as columns of
    the keys: ``v_cache = k_cache[..., :512]``; CUDA kernels then read them once, and have head dims
    above 256 for such caches only. Planned once a step: ``Attention(head_dim=576,
    head_dim_v=512)``.

    Args:
        q: queries; the last ``q_len`` tokens of each sequence.
        k_cache: keys.
        v_cache: values.
        block_table: block ids of each sequence; entries beyond its length, or wholly before the
            window of its first query, are never read.
        seq_lens: keys of each sequence; 0 is legal.
        cu_seqlens_q: int32 ``[batch + 1]``, where each sequence's rows of q begin; None is one
            row each.
        causal: see `attention`; likewise for the options that follow.
        window: see `attention`.
        scale: see `attention`.
        softcap: see `attention`.
        alibi_slopes: see `attention`.
        sinks: see `attention`.
        mask: see `attention`; ``[total_q, bytes]``.
        mask_kind: see `attention`.
        k_scale: what the elements of a quantised k_cache are multiplied by: a number > 0, or
            float32 ``[num_kv_heads]``, or float32 ``[num_blocks, block_size, num_kv_heads]``, one
            a token and head, of any strides (tokens next to each other are read fastest).
        v_scale: likewise of v_cache.
        out: where to write, ``[total_q, num_heads, head_dim_v]``; see `attention`.
        lse: float32 ``[num_heads, total_q]``, natural log.
        return_lse: also return `lse`.
        stream: CUDA stream, an int or an object with ``__cuda_stream__``; None is the one that the
            framework of `q` works on. On the CPU only None.

    Returns:
        As `attention`. Whatever lies beyond a sequence's length (cache tails, unused blocks and
        table entries) cannot change it.

    Raises:
        ValueError: an argument is wrong; the message names it. Nothing has been written.
        TypeError: an argument is no tensor.
        NotImplementedError: no kernel for this combination; the message says why.

    Example::

        cache = numpy.zeros((64, 2, 16, 4, 64), "float32")  # blocks, K and V, tokens, heads, dim
        table = numpy.array([[3, 7]], "int32")
        out = quire.paged_attention(numpy.ones((1, 8, 64), "float32"), cache[:, 0], cache[:, 1],
                                    table, numpy.array([20], "int32"))

    Source: block tables after Kwon et al., PagedAttention (2023); split-KV decoding after
    Flash-Decoding (2023), in fixed chunks.
    """
    shape = shape_of(q, "paged_attention: q")
    v_shape = shape_of(v_cache, "paged_attention: v_cache")
    for name, extents, ndim in (("q", shape, 3), ("v_cache", v_shape, 4)):
        if len(extents) != ndim:
            raise ValueError(f"paged_attention: {name}: expected {ndim} dimensions, got {extents}")
    if out is None:
        out = empty(q, "paged_attention: q", (*shape[:-1], v_shape[-1]))
    if lse is None and return_lse:
        lse = empty(q, "paged_attention: q", (shape[1], shape[0]), "float32")
    mask_is_tree = is_tree("paged_attention", mask_kind) and mask is not None
    try:
        kernels().paged_attention(
            q,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            out,
            lse,
            cu_seqlens_q,
            causal,
            window,
            scale,
            softcap,
            alibi_slopes,
            sinks,
            mask,
            mask_is_tree,
            k_scale,
            v_scale,
            stream,
        )
    except TypeError:
        refuse_wrong_type("paged_attention", causal, window, scale, softcap)
        raise
    return (out, lse) if return_lse else out


@functional_in_jax
def merge_states(outs: Tensor | list[Tensor], lses: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join partial results over disjoint sets of keys: n of (out, lse) -> one (out, lse).

    outs ``[n, total_q, num_heads, head_dim]`` (or a list of n arrays), lses float32
    ``[n, num_heads, total_q]``, natural log. A state with lse = -inf does not count, whatever its
    out holds; a row with none left is 0 with lse = -inf.

    Raises:
        ValueError: an argument is wrong.

    Example::

        out, lse = quire.merge_states([out_a, out_b], [lse_a, lse_b])

    Source: the log-sum-exp rule of Milakov & Gimelshein, online softmax (2018).
    """
    outs, lses = stack(outs, "merge_states: outs"), stack(lses, "merge_states: lses")
    shape = shape_of(outs, "merge_states: outs")
    if len(shape) != 4:
        raise ValueError(
            "merge_states: outs: expected [n, total_q, num_heads, head_dim], got "
            f"{list(shape)} {outs.dtype}"
        )
    out = empty(outs, "merge_states: outs", shape[1:])
    lse = empty(outs, "merge_states: outs", (shape[2], shape[1]), "float32")
    kernels().merge_states(outs, lses, out, lse)
    return out, lse
