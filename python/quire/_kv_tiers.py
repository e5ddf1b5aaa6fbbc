# SPDX-License-Identifier: Apache-2.0
"""The copies between a KVCache on the CPU, host memory and stores that a manager asks for."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any

import numpy as np

from ._kv_cache import KVCache

if TYPE_CHECKING:
    import numpy.typing as npt

    from ._core import (
        KVCacheManager,
        KVStore,
        KVTicket,
        KVTransfer,
        ScheduledBatch,
        Sequence,
    )


class KVTiers:
    """Keeps what a manager evicts in slower places, and brings it back.

    `stores` (HostStore, FileStore; the nearest first) get the contents of evicted blocks and give
    them to new sequences; `manager.num_host_blocks` blocks of host memory hold sequences that are
    swapped out. A put that a store refuses or fails loses the copy; a get that fails leaves its
    tokens to be computed.

    Call `offload` after every step, before any KV of it is written.

    Raises ValueError for a cache of another block size or of fewer blocks than the manager hands
    out, for a store whose block_bytes are not those of the cache, and for two stores of one tier.

    Example::

        host = quire.HostStore(capacity_bytes=8 << 30, block_bytes=cache.block_bytes)
        tiers = quire.KVTiers(manager, cache, [host])
        seq = manager.create(prompt)
        tiers.fetch(seq)                 # seq.num_computed_tokens grows by what came
        batch = manager.step([seq], [seq.num_tokens - seq.num_computed_tokens])
        tiers.offload()
    """

    def __init__(
        self, manager: KVCacheManager, cache: KVCache, stores: Items[KVStore] = ()
    ) -> None:
        """Attach the stores to the manager; see the class."""
        blocks, block_size = cache.k(0).shape[:2]
        if blocks < manager.num_blocks or block_size != manager.block_size:
            raise ValueError(
                f"KVTiers: cache: expected {manager.num_blocks} blocks or more of "
                f"{manager.block_size} tokens, as the manager has, got {blocks} of {block_size}"
            )
        if len({store.tier for store in stores}) < len(stores):
            raise ValueError("KVTiers: stores: expected one a tier, got two of the same")
        for store in stores:
            if store.block_bytes != cache.block_bytes:
                raise ValueError(
                    f"KVTiers: stores: expected block_bytes {cache.block_bytes}, "
                    f"got {store.block_bytes}"
                )
        for store in stores:
            manager.attach_store(store)
        self._manager = manager
        self._cache = cache
        self._stores = list(stores)
        num_host_blocks = manager.stats().num_host_blocks
        self._host = cache.like(num_host_blocks) if num_host_blocks else None
        self._puts: list[KVTicket] = []

    def _put(self, stores: Items[KVStore], key: bytes, payload: npt.NDArray[np.uint8]) -> None:
        self._puts = [ticket for ticket in self._puts if ticket.outcome == "pending"]
        for store in stores:
            ticket = None if store.contains(key) else store.put(key, payload)
            if ticket is not None:
                self._puts.append(ticket)

    def offload(self) -> int:
        """Puts what the latest call evicted into the stores; returns how many blocks that were.

        Example::

            tiers.offload()
        """
        offloads = self._manager.take_offloads()
        for transfer in offloads:
            self._put(self._stores, transfer.key, self._cache.read_block(transfer.block))
        return len(offloads)

    def fetch(self, seq: Sequence) -> int | None:
        """Brings what stores hold of a sequence's prompt; returns how many tokens came.

        None when out of blocks: then nothing has changed.

        Example::

            tiers.fetch(manager.create(prompt))
        """
        loads = self._manager.fetch(seq)
        if loads is None:
            return None
        num_came = 0
        try:
            # Got before anything is put, which may push it out; written when that is saved.
            came = self._get(loads)
            self.offload()
            for load, payload, nearer in came:
                self._cache.write_block(load.block, payload)
                self._put(nearer, load.key, payload)
                num_came += 1
        finally:
            if loads:
                self._manager.fetched(seq, num_came)
        return num_came * self._manager.block_size

    def _get(self, loads: list[KVTransfer]) -> list[tuple[KVTransfer, Any, Items[KVStore]]]:
        """The payloads of leading loads, until one fails, and the stores that are nearer."""
        requests: list[tuple[KVTransfer, Any, KVTicket]] = []
        for load in loads:
            store = next(s for s in self._stores if s.tier == load.tier)
            payload = np.empty(self._cache.block_bytes, np.uint8)
            ticket = store.get(load.key, payload)
            while ticket is None and any(t.outcome == "pending" for _, _, t in requests):
                next(t for _, _, t in requests if t.outcome == "pending").wait()
                ticket = store.get(load.key, payload)
            if ticket is None:
                break
            requests.append((load, payload, ticket))
        came: list[tuple[KVTransfer, Any, Items[KVStore]]] = []
        for load, payload, ticket in requests:
            if ticket.wait() != "done":
                break
            num_nearer = [s.tier for s in self._stores].index(load.tier)
            came.append((load, payload, self._stores[:num_nearer]))
        return came

    def swap_out(self, seq: Sequence) -> bool:
        """Moves a sequence to host memory; False when there is no room there.

        Example::

            tiers.swap_out(seq)
        """
        pairs = self._manager.swap_out(seq)
        if pairs is not None and self._host is not None:
            self._host.copy_from(self._cache, pairs)
        return pairs is not None

    def swap_in(self, seq: Sequence) -> bool:
        """Brings a sequence back, bit by bit; False when out of blocks.

        Example::

            tiers.swap_in(seq)
        """
        pairs = self._manager.swap_in(seq)
        if pairs is None:
            return False
        self.offload()
        if self._host is not None:
            self._cache.copy_from(self._host, pairs)
        return True

    def swap(self, batch: ScheduledBatch) -> None:
        """Makes the copies to and from host memory that a Scheduler's batch asks for.

        Puts what the step evicts into the stores first, like `offload`. Call it before
        `batch.copies` are made and any KV is written.

        Example::

            batch = scheduler.schedule()
            tiers.swap(batch)            # then batch.copies, then the model
        """
        self.offload()
        if self._host is not None:
            self._host.copy_from(self._cache, batch.swap_out)
            self._cache.copy_from(self._host, batch.swap_in)

    def drain(self) -> None:
        """Waits until the stores have what they were given.

        Example::

            tiers.drain()
        """
        for store in self._stores:
            store.drain()
        self._puts.clear()
