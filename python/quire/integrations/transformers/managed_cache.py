# SPDX-License-Identifier: Apache-2.0
"""The paged cache of continuous batching, its blocks and prefixes kept by a KVCacheManager.

transformers' scheduler keeps its own calls; what they ask of the cache goes to the manager: room
for new tokens, prefixes, forks, eviction. A shared prefix may end inside a block, unused blocks go
one by one and oldest first, and a step's tables come from one call for the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cache import (
    PagedAttentionCache,
    group_layers_by_attn_type,
)
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION
from transformers.generation.continuous_batching.requests import RequestStatus

import quire

from .cache import IMPLEMENTATION


def install() -> None:
    """Let continuous batching make its cache with `make_cache`, for models after `enable`."""
    continuous_api.PagedAttentionCache = make_cache


def make_cache(
    config: Any,
    continuous_batching_config: Any,
    device: Any,
    distributed_helper: Any,
    **options: Any,
) -> PagedAttentionCache:
    """A ManagedCache where one fits, or else transformers' own cache."""
    fits = config._attn_implementation == IMPLEMENTATION and is_manageable(
        config, continuous_batching_config, distributed_helper
    )
    kind = ManagedCache if fits else PagedAttentionCache
    return kind(config, continuous_batching_config, device, distributed_helper, **options)


def is_manageable(config: Any, batching: Any, distributed_helper: Any) -> bool:
    """Whether all layers see the whole past, and steps run one by one as they are.

    Layers with a sliding window overwrite their blocks, and share the memory with the others in
    portions that move between them. Padded and overlapping steps, several processes and a swap
    space are of GPUs.
    """
    return (
        set(group_layers_by_attn_type(config)) == {FULL_ATTENTION}
        and distributed_helper.tp_size == 1
        and not batching.use_async_batching
        and not batching.cpu_offload_space
        and batching.varlen_compile_config is None
        and batching.decode_compile_config is None
    )


class ManagedCache(PagedAttentionCache):  # type: ignore[misc]
    """Paged keys and values whose blocks a `quire.KVCacheManager` hands out.

    `pages[layer]`: K and V ``[num_blocks, block_size, num_kv_heads, head_dim]``, views of the
    cache's memory behind the two sectors that transformers sets apart.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Arguments of `PagedAttentionCache`."""
        super().__init__(*args, **options)
        (allocator,) = self.cache_allocators.values()
        self._allocator = allocator
        self._first_block = 2 * allocator.blocks_per_sector
        allocator.block_table = _BlockTables(self)
        size, layers = allocator.tokens_per_page, allocator.layer_indices
        heads = allocator.cache_tensor.shape[2:]
        blocks = allocator.cache_tensor.view(-1, len(layers), 2, size, *heads)[self._first_block :]
        self.pages = {
            layer: (blocks[:, index, 0], blocks[:, index, 1]) for index, layer in enumerate(layers)
        }
        self.sequences: dict[str, quire._core.Sequence] = {}
        self._batch_of: Any = None  # the list that marks a batch, see extend_read_and_write_indices
        self._rows: list[tuple[str, int]] = []  # of the batch: request, new tokens
        self.batch: Any = None  # of the running step
        self._make_manager()

    def _make_manager(self) -> None:
        size = self._allocator.tokens_per_page
        self.manager = quire.KVCacheManager(
            self._allocator.num_blocks, size, prefix_caching=self.use_prefix_sharing
        )

    def _create(self, request_id: str, token_ids: list[int]) -> quire._core.Sequence:
        self.free_blocks(request_id)  # one that waited: by now more of its prefix may be here
        seq = self.manager.create(np.array(token_ids, np.int32))
        self.sequences[request_id] = seq
        return seq

    @property
    def _num_available_blocks(self) -> int:
        return self.manager.num_free_blocks + self.manager.num_cached_blocks

    # ---- What the scheduler asks

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """Share what is cached of the prompt; returns how many tokens, less than all."""
        if not self.use_prefix_sharing:
            return 0
        return self._create(request_id, prompt_ids).num_cached_tokens

    def can_store_request_tokens(self, state: Any, request_len: int, dry_run: bool = False) -> bool:
        """Give the request room for its next request_len tokens, unless it is a dry run."""
        if dry_run:
            past = state.current_len()
            needed = self._allocator.needs_new_blocks(state.request_id, past, request_len)
            return bool(needed <= self._num_available_blocks)
        seq = self.sequences.get(state.request_id)
        if seq is None:
            seq = self._create(state.request_id, state.remaining_prefill_tokens)
        batch = self.manager.step([seq], [request_len])
        if batch is None:
            return False
        if len(batch.copies):  # of all layers at once, and before a step writes behind them
            self._allocator.copy_blocks(*(batch.copies + self._first_block).T.tolist())
        return True

    def count_storable_requests(self, list_blocks_needed: list[dict[str, int]]) -> int:
        """How many of these requests, from the first on, there are blocks for."""
        needed = np.cumsum([sum(blocks.values()) for blocks in list_blocks_needed])
        return int((needed <= self._num_available_blocks).sum())

    def compute_free_capacity(self, relative: bool = True) -> int | float:
        """Unused memory in bytes, or as a part of all; cached blocks are unused."""
        if relative:
            return self._num_available_blocks / self.manager.num_blocks
        return self._num_available_blocks * int(self._allocator.bytes_per_block)

    def evict_cached_blocks(self) -> bool:
        """Nothing to do ahead: a cached block is evicted when its room is needed."""
        return False

    def count_new_complete_blocks(self, state: Any, request_len: int) -> dict[str, int]:
        """No counts: the manager knows which blocks a step fills."""
        return {}

    # ---- A step

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        """Note a row of the batch; the lists stay empty, and each batch has its own."""
        if write_index is not self._batch_of:
            self._batch_of, self._rows = write_index, []
        self._rows.append((request_id, query_length))

    def begin_step(self) -> quire._core.StepBatch:
        """The tables of the batch that is about to run; its blocks were given before."""
        ids, counts = zip(*self._rows, strict=True)
        batch = self.manager.step([self.sequences[id] for id in ids], np.array(counts, np.int32))
        assert batch is not None
        return batch

    def update(self, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Not used: quire's attention writes and reads the pages itself."""
        raise RuntimeError(
            f"ManagedCache: expected the attention {IMPLEMENTATION!r} as long as the cache lives"
        )

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        """The keys and values of the request's step are written, its new token is known."""
        seq = self.sequences[state.request_id]
        if state.status == RequestStatus.DECODING:
            self.manager.commit([seq], np.array(state.generated_tokens[-1:], np.int32))
        else:  # more of its prompt is to come, or it ends here
            self.manager.commit([seq])

    # ---- Forks and ends

    def prepare_fork_request(
        self, src_state: Any, dst_req_ids: list[str], copy_src_and_dst: dict[str, Any]
    ) -> list[str]:
        """Fork a request; its children share all blocks until they write."""
        children = self.manager.fork(self.sequences[src_state.request_id], len(dst_req_ids))
        self.sequences.update(zip(dst_req_ids, children, strict=True))
        return dst_req_ids

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """End a request's sequence; what it computed stays cached as long as there is room."""
        if (seq := self.sequences.pop(request_id, None)) is not None:
            self.manager.free([seq])

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        """End all sequences; with clear_ledgers the prefixes are forgotten, too."""
        self.manager.free(list(self.sequences.values()))
        self.sequences.clear()
        if clear_ledgers:
            self._make_manager()


class _BlockTables(Mapping[str, list[int]]):
    """Block ids by request, as transformers counts them, for its code that reads them."""

    def __init__(self, cache: ManagedCache) -> None:
        self._cache = cache

    def __getitem__(self, request_id: str) -> list[int]:
        table = self._cache.sequences[request_id].block_table
        return [block + self._cache._first_block for block in table.tolist()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cache.sequences)

    def __len__(self) -> int:
        return len(self._cache.sequences)
