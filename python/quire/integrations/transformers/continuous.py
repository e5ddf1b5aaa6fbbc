# SPDX-License-Identifier: Apache-2.0
"""Attention over the pages of transformers' continuous batching, read where they lie.

A ManagedCache has the tables of a step. transformers' own cache hands out row numbers, one for each
token: ``page * page_size + offset`` in a layer's view of the pool. A step's block tables follow
from them once for all layers of an allocator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.continuous_batching.cache_allocators import (
    SlidingAttentionCacheAllocator,
)

import quire

from .managed_cache import ManagedCache

_STEP = "_quire_step"  # on an allocator: the tables of the running step


@dataclass
class Step:
    """What all layers of one allocator share in a step.

    slots: int64 [total_q], where the new keys go; cu_seqlens_q, cu_seqlens_k: int32 [batch + 1].
    block_table: int32 [batch, max_blocks] with seq_lens, int32 [batch]; None where the keys do not
    lie in pages as they are wanted: then the allocator itself writes and gathers.
    """

    slots: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    block_table: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None


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
    read_index = kwargs["read_index"][allocator.index]
    write_index = kwargs["write_index"][allocator.index]
    if layer == allocator.layer_indices[0]:
        cu_k = kwargs["cu_seq_lens_k"][allocator.layer_type]
        step = plan_step(allocator, read_index, write_index, kwargs["cu_seq_lens_q"], cu_k)
        setattr(allocator, _STEP, step)
    step = getattr(allocator, _STEP)
    options = {**options, "cu_seqlens_q": step.cu_seqlens_q}
    out: Any
    if step.block_table is None:
        k, v = allocator.update(k, v, layer, read_index, write_index)
        out = quire.attention(q, k, v, cu_seqlens_k=step.cu_seqlens_k, **options)
    else:
        k_pages, v_pages = allocator._kv_page_views[layer]
        quire.append_kv(k, v, k_pages, v_pages, step.slots)
        out = quire.paged_attention(q, k_pages, v_pages, step.block_table, step.seq_lens, **options)
    return out


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
    """What a step's layers share. The allocator must write and gather in two cases.

    A step without a past needs no pages: the new keys are all there are. And a chunk of a prompt
    in a ring buffer overwrites slots that its first rows still see.
    """
    step = Step(write_index.to(torch.int64), cu_q.to(torch.int32), cu_k.to(torch.int32))
    if read_index.numel() == 0:
        return step
    page_size = allocator.tokens_per_page
    if not isinstance(allocator, SlidingAttentionCacheAllocator):
        step.block_table = _pages_of_rows(read_index, step.cu_seqlens_k, page_size)
        step.seq_lens = step.cu_seqlens_k.diff()
    elif cu_q.numel() - 1 == int(cu_q[-1]) and allocator.sliding_window % page_size == 0:
        step.block_table, step.seq_lens = _ring_tables(
            read_index, write_index, step.cu_seqlens_k, page_size, allocator.sliding_window
        )
    return step


def _pages_of_rows(rows: torch.Tensor, cu_k: torch.Tensor, page_size: int) -> torch.Tensor:
    """Every page_size-th row of a sequence begins a page."""
    num_pages = (cu_k.diff() + page_size - 1) // page_size
    column = torch.arange(int(num_pages.max()), dtype=torch.int64)
    first = cu_k[:-1, None].to(torch.int64) + column * page_size
    first = torch.where(column < num_pages[:, None], first, 0)
    return (rows[first] // page_size).to(torch.int32)


def _ring_tables(
    rows: torch.Tensor, new_rows: torch.Tensor, cu_k: torch.Tensor, page_size: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables and lengths of one new token a sequence in ring buffers: slot = position % window.

    The new token takes the slot of the one that leaves the window, so writing first is safe. In a
    ring that has wrapped, the page of the new token is the newest up to it and the oldest behind
    it: it stands at both ends of the table, and the window hides what does not belong to an end.
    """
    tables, lengths = [], []
    for i, new_row in enumerate(new_rows.tolist()):
        old = rows[int(cu_k[i]) : int(cu_k[i + 1]) - 1]  # without the new token's own entry
        new_page, offset = divmod(new_row, page_size)
        if old.numel() < window - 1:  # not wrapped: from slot 0 on
            pages = old[::page_size] // page_size
            if old.numel() % page_size == 0:
                pages = torch.cat([pages, pages.new_tensor([new_page])])
            lengths.append(old.numel() + 1)
        else:
            others = old[page_size - 1 - offset :: page_size] // page_size
            ends = others.new_tensor([new_page])
            pages = torch.cat([ends, others[: window // page_size - 1], ends])
            lengths.append(window + offset + 1)
        tables.append(pages.to(torch.int32))
    table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
    return table, torch.tensor(lengths, dtype=torch.int32)
