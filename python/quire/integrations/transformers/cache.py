# SPDX-License-Identifier: Apache-2.0
"""A paged cache for `generate`: blocks and sequences of a KVCacheManager behind `Cache`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

import quire

# Continuous batching takes an implementation with packed sequences and no dense mask only under a
# name with "flash" in it.
IMPLEMENTATION = "quire_flash"
LAYER = "quire_layer"  # on the keys that update() returns: where the attention finds the pages


class QuireLayer(CacheLayerMixin):  # type: ignore[misc]
    """Pages of one layer: K and V ``[num_blocks, num_kv_heads, block_size, head_dim]``.

    `update` only notes the new tokens: the attention function, which knows the padding, writes
    them and attends to the pages in one go.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, index: int, cache: QuireCache) -> None:
        """The layer number `index` of `cache`."""
        super().__init__()
        self.index = index
        self.cache = cache
        self.num_tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the pages; keys and values ``[batch, num_kv_heads, seq, head_dim]``."""
        blocks, size = self.cache.num_blocks, self.cache.block_size
        self.keys, self.values = (
            x.new_empty(blocks, x.shape[1], size, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new tokens' keys, tagged with this layer, and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.num_tokens += key_states.shape[2]
        setattr(key_states, LAYER, self)
        return key_states, value_states

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Write k, v and attend: q, k, v ``[batch, seq, heads, dim]``, mask ``[batch, seen]``."""
        if self.index == 0:
            self.cache.begin_step(q.shape[0], q.shape[1], mask)
        batch, new = self.cache.batch, self.cache.new_tokens
        k_pages, v_pages = (x.transpose(1, 2) for x in (self.keys, self.values))
        if len(batch.copies):
            quire.copy_blocks(k_pages, v_pages, batch.copies)
        q, k, v = (x.flatten(0, 1) if new is None else x[new] for x in (q, k, v))
        quire.append_kv(k, v, k_pages, v_pages, batch.slot_mapping)
        rows: Any = quire.paged_attention(
            q,
            k_pages,
            v_pages,
            batch.block_table,
            batch.seq_lens,
            cu_seqlens_q=batch.cu_seqlens_q,
            **options,
        )
        out: torch.Tensor
        if new is None:
            out = rows.unflatten(0, (self.cache.batch_size, -1))
            return out
        out = rows.new_zeros(*new.shape, *rows.shape[1:])
        out[new] = rows
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, offset of the first) that a mask for `query_length` new rows covers."""
        return self.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """-1: sequences share the pool, none has a limit of its own."""
        return -1


class QuireCache(Cache):  # type: ignore[misc]
    """Paged KV cache for `generate(past_key_values=...)` of a model after `enable`.

    Padding takes no memory, sequences share one pool, and beams share their common blocks: to
    reorder them is to fork sequences, nothing is copied but a partial block at the next write.

    Args:
        model: the model that will use it, after `enable(model)`.
        max_tokens: tokens that the pool holds, over all sequences; its memory is touched as it is
            used.
        block_size: tokens in a block.

    Raises:
        ValueError: the model is not enabled, or a count is below 1.

    Example::

        enable(model)
        model.generate(**inputs, past_key_values=QuireCache(model), num_beams=4)
    """

    def __init__(
        self, model: PreTrainedModel, *, max_tokens: int = 32768, block_size: int = 16
    ) -> None:
        """Make an empty cache; see the class."""
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"QuireCache: model: expected one after enable(model), got one whose attention is "
                f"{config._attn_implementation!r}"
            )
        self.block_size = block_size
        self.num_blocks = -(-max_tokens // block_size)
        self.manager = quire.KVCacheManager(self.num_blocks, block_size, prefix_caching=False)
        self.sequences: list[quire._core.Sequence] = []
        self.batch: Any = None  # of the running step
        self.new_tokens: torch.Tensor | None = None  # bool [batch, seq]; None: no padding
        super().__init__(layers=[QuireLayer(i, self) for i in range(config.num_hidden_layers)])

    @property
    def batch_size(self) -> int:
        """Sequences in the cache; -1 before the first tokens."""
        return len(self.sequences) or -1

    def begin_step(self, batch_size: int, num_new: int, mask: torch.Tensor | None) -> None:
        """Give slots to the new tokens: the last num_new of each sequence, without padding."""
        counts = np.full(batch_size, num_new, np.int32)
        self.new_tokens = None
        if mask is not None:
            self.new_tokens = mask[:, -num_new:].bool()
            counts = self.new_tokens.sum(1, dtype=torch.int32).numpy()
        # The manager counts tokens; which ones they are matters to a prefix cache only. A sequence
        # has one more than it has computed, so that a row may begin with padding alone.
        if self.sequences:
            self.manager.commit(self.sequences)
            self.manager.commit(self.sequences, sampled=[np.zeros(n, np.int32) for n in counts])
        else:
            self.sequences = [self.manager.create(np.zeros(n + 1, np.int32)) for n in counts]
        self.batch = self.manager.step(self.sequences, counts)
        if self.batch is None:
            raise RuntimeError(
                f"QuireCache: out of blocks: expected at most {self.num_blocks * self.block_size} "
                f"tokens in all (max_tokens)"
            )

    def _select(self, rows: list[int]) -> None:
        """Row i of the batch becomes what row rows[i] was."""
        self.manager.commit(self.sequences)
        kept = [self.manager.fork(self.sequences[row]) for row in rows]
        self.manager.free(self.sequences)
        self.sequences = kept

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues row beam_idx[i]."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        self._select(torch.arange(len(self.sequences))[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._select([row for row in range(len(self.sequences)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence (rejected candidates)."""
        self.manager.commit(self.sequences)
        for row, seq in enumerate(self.sequences):
            num_kept = seq.num_computed_tokens - tokens_to_remove
            if num_kept > 0:
                self.manager.truncate(seq, num_kept)
                self.manager.commit([seq], sampled=np.zeros(1, np.int32))
            else:
                self.manager.free([seq])
                self.sequences[row] = self.manager.create(np.zeros(1, np.int32))
        for layer in self.layers:
            layer.num_tokens -= tokens_to_remove

    def reset(self) -> None:
        """Forget all sequences; the pages stay allocated."""
        self.manager.free(self.sequences)
        self.sequences = []
        for layer in self.layers:
            layer.num_tokens = 0
