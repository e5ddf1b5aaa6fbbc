# SPDX-License-Identifier: Apache-2.0
"""Attention over the pages of transformers' continuous batching, read where they lie.

A ManagedCache has the tables of a step. transformers' own cache hands out row numbers, one for each
token: ``page * page_size + offset`` in a layer's view of the pool. A step's block tables follow
from them once for all layers of an allocator. Layers with a sliding window have ring buffers there,
``slot = position % window``: a chunk of a prompt that overwrites keys which its own first rows
still see attends to the ring before it writes, and apart to its own keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.continuous_batching.cache_allocators import (
    SlidingAttentionCacheAllocator,
)

import quire

from .managed_cache import ManagedCache

_STEP = "_quire_step"  # on an allocator: the tables of the running step


@dataclass
class Past:
    """The keys that were written before a step, of sequences with one number of rows that see them.

    rows: int64, which rows of q those are, num_rows of each sequence; block_table int32
    [sequences, max_blocks] and seq_lens int32 [sequences] as `quire.paged_attention` has them.
    """

    num_rows: int
    rows: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor


@dataclass
class Step:
    """What all layers of one allocator share in a step.

    slots: int64 [total_q], where the new keys go, -1 for those that the chunk itself overwrites;
    cu_seqlens_q: int32 [batch + 1]; block_size: of the tables [tokens].
    block_table: int32 [batch, max_blocks] with seq_lens, int32 [batch], of all keys once the new
    ones are written; None where the new ones are to be attended to apart from `past`, and first.
    """

    slots: torch.Tensor
    cu_seqlens_q: torch.Tensor
    block_size: int
    block_table: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    past: list[Past] = field(default_factory=list)


def attend_continuous(
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: Any,
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> torch.Tensor:
    """Writes the new k, v [total_q, num_kv_heads, head_dim] and attends to the whole sequences.

    q [total_q, num_heads, head_dim]; cache, kwargs: of transformers' continuous batching.
    """
    if isinstance(cache, ManagedCache):
        return _attend_managed(layer, q, k, v, cache, options)
    allocator = cache.layer_to_allocator[layer]
    if layer == allocator.layer_indices[0]:
        read_index = kwargs["read_index"][allocator.index]
        write_index = kwargs["write_index"][allocator.index]
        cu_k = kwargs["cu_seq_lens_k"][allocator.layer_type]
        step = plan_step(allocator, read_index, write_index, kwargs["cu_seq_lens_q"], cu_k)
        setattr(allocator, _STEP, step)
    step = getattr(allocator, _STEP)
    k_pages, v_pages = _pages(allocator, layer, step.block_size)
    out: Any
    if step.block_table is None:
        out = _attend_apart(q, k, v, k_pages, v_pages, step, options)
        quire.append_kv(k, v, k_pages, v_pages, step.slots)
    else:
        quire.append_kv(k, v, k_pages, v_pages, step.slots)
        table, lengths, rows = step.block_table, step.seq_lens, step.cu_seqlens_q
        out = quire.paged_attention(
            q, k_pages, v_pages, table, lengths, cu_seqlens_q=rows, **options
        )
    return out


def _pages(allocator: Any, layer: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's K and V [num_blocks, block_size, num_kv_heads, head_dim]: pages or parts of pages.

    The rows of both lead to the pool's end, and V's begin later: K's are cut to as many blocks.
    """
    if block_size == allocator.tokens_per_page:
        k_pages, v_pages = allocator._kv_page_views[layer]
        return k_pages, v_pages
    k_rows, v_rows = allocator._kv_token_views[layer]
    num_rows = len(v_rows) // block_size * block_size
    k_pages, v_pages = (x[:num_rows].unflatten(0, (-1, block_size)) for x in (k_rows, v_rows))
    return k_pages, v_pages


def _attend_apart(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    step: Step,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention to the new keys and to those before, joined; nothing has been written yet."""
    rows = step.cu_seqlens_q
    parts: Any = quire.attention(
        q, k, v, cu_seqlens_q=rows, cu_seqlens_k=rows, return_lse=bool(step.past), **options
    )
    if not step.past:
        return parts
    out, lse = parts
    past_out, past_lse = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    window = options["window"][0] + 1
    for past in step.past:
        # A row stands `num_rows` further left against keys of the past alone, and sees all of
        # them on its right. The sinks are in the other part.
        apart = {**options, "causal": False, "window": (window - 1 - past.num_rows, -1)}
        apart["sinks"] = None
        count = len(past.seq_lens)
        past_out[past.rows], past_lse[:, past.rows] = quire.paged_attention(
            q[past.rows],
            k_pages,
            v_pages,
            past.block_table,
            past.seq_lens,
            cu_seqlens_q=torch.arange(count + 1, dtype=torch.int32) * past.num_rows,
            return_lse=True,
            **apart,
        )
    return quire.merge_states([out, past_out], [lse, past_lse])[0]


def _attend_managed(
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: ManagedCache,
    options: dict[str, Any],
) -> torch.Tensor:
    if layer == next(iter(cache.pages)):
        cache.batch = cache.begin_step()
    batch, (k_pages, v_pages) = cache.batch, cache.pages[layer]
    quire.append_kv(k, v, k_pages, v_pages, batch.slot_mapping)
    rows = batch.cu_seqlens_q
    out: Any
    if int(batch.seq_lens.sum()) == rows[-1]:  # no past: the new keys are all there are
        out = quire.attention(q, k, v, cu_seqlens_q=rows, cu_seqlens_k=rows, **options)
    else:
        table, lengths = batch.block_table, batch.seq_lens
        out = quire.paged_attention(
            q, k_pages, v_pages, table, lengths, cu_seqlens_q=rows, **options
        )
    return out


def plan_step(
    allocator: Any,
    read_index: torch.Tensor,
    write_index: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
) -> Step:
    """What a step's layers share.

    read_index: the rows of each sequence's keys, oldest first, from cu_k[i] on; empty where the new
    keys are all there are. Of a ring those that the step writes are no rows yet.
    """
    block_size = allocator.tokens_per_page
    slots, cu_q = write_index.to(torch.int64), cu_q.to(torch.int32)
    if not isinstance(allocator, SlidingAttentionCacheAllocator):
        step = Step(slots, cu_q, block_size)
        if read_index.numel():
            step.block_table, step.seq_lens = _tables(read_index, cu_k[:-1], cu_k[1:], block_size)
        return step
    # Blocks that fill a ring without remainder: keys that follow each other over its end do so in
    # the table, too.
    window = allocator.sliding_window
    block_size = math.gcd(window, block_size)
    slots = torch.where(slots == allocator.write_trash_index, -1, slots)
    step = Step(slots, cu_q, block_size)
    if read_index.numel() == 0:
        return step
    if int(cu_k.diff().max()) <= window:  # nothing is written over a key that is still seen
        rows = read_index.clone()
        rows[rows == allocator.sentinel_index] = write_index
        step.block_table, step.seq_lens = _tables(rows, cu_k[:-1], cu_k[1:], block_size)
    else:
        step.past = _split_past(read_index, cu_q, cu_k, window, block_size)
    return step


def _split_past(
    rows: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, window: int, block_size: int
) -> list[Past]:
    """The rings as they are before a step, for the rows that see any of their keys.

    One `Past` for each number of such rows: the window against keys of the past alone depends on
    it. All decoding sequences are in one.
    """
    new = cu_q.diff()
    end = cu_k[1:] - new
    seeing = torch.where(end > cu_k[:-1], new.clamp(max=window - 1), 0)
    found = []
    for num_rows in seeing.unique().tolist():
        if num_rows:
            chosen = seeing == num_rows
            q_rows = cu_q[:-1][chosen, None] + torch.arange(num_rows)
            table, lengths = _tables(rows, cu_k[:-1][chosen], end[chosen], block_size)
            found.append(Past(num_rows, q_rows.flatten(), table, lengths))
    return found


def _tables(
    rows: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block table and lengths of the sequences whose keys' rows are ``rows[begin[i]:end[i]]``.

    In a ring the oldest key may lie inside its block, behind the newest ones: those stand at both
    ends of the table then, count twice in the length, and at the front the window hides them.
    """
    first = rows[begin.long()] % block_size
    lengths = first + (end - begin)
    column = torch.arange(int((lengths.max() + block_size - 1) // block_size))
    at = begin[:, None] + (column * block_size - first[:, None]).clamp(min=0)
    at = torch.where(column * block_size < lengths[:, None], at, begin[:, None])
    return (rows[at] // block_size).to(torch.int32), lengths.to(torch.int32)
