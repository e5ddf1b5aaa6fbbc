# SPDX-License-Identifier: Apache-2.0
"""A manager that keeps a log of its calls, to run them again."""

from __future__ import annotations

from collections import abc
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ._core import (
    CallLogWriter,
    KVCacheManager,
    KVStore,
    KVTransfer,
    LayerGroup,
    Sequence,
    StepBatch,
)

# In the order of the core's LoggedCall::Operation, Eviction and CacheTier.
_Operation = Literal[
    "create",
    "step",
    "commit",
    "fork",
    "truncate",
    "free",
    "retire",
    "attach_store",
    "fetch",
    "fetched",
    "swap_out",
    "swap_in",
]
_OPERATIONS: tuple[_Operation, ...] = get_args(_Operation)
_EVICTIONS = ("lru", "reuse_lru")
_TIERS = ("device", "host", "file")
_DONE, _OUT_OF_BLOCKS, _REFUSED = range(3)


def _int32(values: npt.ArrayLike) -> list[int]:
    array: list[int] = np.asarray(values, np.int32).ravel().tolist()
    return array


class RecordedKVCacheManager:
    """A KVCacheManager that writes every call that changes it, and its result, to a file.

    `path` is written anew; the other arguments and all methods are those of KVCacheManager. Each
    call is in the file when it returns. `quire.replay_calls` runs the file again, without stores:
    what fetch() found is in the log. Token ids are in the log as they are.

    pin() and unpin() are not recorded: a replay of a manager with pins may differ.

    Raises OSError where the file can't be written.

    Example::

        manager = quire.RecordedKVCacheManager("calls.quirelog", num_blocks=4096, block_size=16)
        seq = manager.create(prompt)
    """

    def __init__(
        self,
        path: str,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool = True,
        async_depth: int = 0,
        *,
        eviction: str = "lru",
        event_capacity: int = 0,
        num_host_blocks: int = 0,
        groups: abc.Sequence[LayerGroup] = (),
    ) -> None:
        """Make the manager and open the file; see the class."""
        self._manager = KVCacheManager(
            num_blocks,
            block_size,
            prefix_caching,
            async_depth,
            eviction=eviction,
            event_capacity=event_capacity,
            num_host_blocks=num_host_blocks,
            groups=groups,
        )
        self._log = CallLogWriter(
            path,
            num_blocks,
            block_size,
            prefix_caching,
            async_depth,
            _EVICTIONS.index(eviction),
            event_capacity,
            num_host_blocks,
            list(groups),
        )
        self._births: dict[Sequence, int] = {}
        self._num_births = 0

    def __getattr__(self, name: str) -> Any:
        """Whatever changes nothing is the manager's own."""
        return getattr(self._manager, name)

    def _write(
        self,
        operation: _Operation,
        outcome: int,
        seqs: list[Sequence],
        values: npt.ArrayLike = (),
        counts: npt.ArrayLike = (),
        salt: str | None = None,
        number: int = 0,
        before: list[npt.NDArray[Any]] | None = None,
        after: list[npt.NDArray[Any]] | None = None,
    ) -> None:
        m = self._manager
        now = np.array([m.num_free_blocks, m.num_used_blocks, m.num_cached_blocks], np.int32)
        self._log.write(
            _OPERATIONS.index(operation),
            outcome,
            [self._births.get(seq, -1) for seq in seqs],
            _int32(values),
            _int32(counts),
            salt,
            number,
            [*(before or []), now, *(after or [])],
        )

    def _add(self, seq: Sequence) -> list[npt.NDArray[Any]]:
        self._births[seq] = self._num_births
        self._num_births += 1
        return [np.array([seq.num_cached_tokens], np.int64), *seq.block_tables]

    def create(self, token_ids: npt.ArrayLike, salt: str | None = None) -> Sequence:
        """See KVCacheManager.create."""
        try:
            seq = self._manager.create(token_ids, salt)
        except ValueError:
            self._write("create", _REFUSED, [], token_ids, salt=salt)
            raise
        self._write("create", _DONE, [], token_ids, salt=salt, after=self._add(seq))
        return seq

    def fork(self, seq: Sequence) -> Sequence:
        """See KVCacheManager.fork."""
        try:
            child = self._manager.fork(seq)
        except ValueError:
            self._write("fork", _REFUSED, [seq])
            raise
        self._write("fork", _DONE, [seq], after=self._add(child))
        return child

    def step(self, seqs: list[Sequence], num_new_tokens: npt.ArrayLike) -> StepBatch | None:
        """See KVCacheManager.step."""
        try:
            batch = self._manager.step(seqs, num_new_tokens)
        except ValueError:
            self._write("step", _REFUSED, seqs, num_new_tokens)
            raise
        if batch is None:
            self._write("step", _OUT_OF_BLOCKS, seqs, num_new_tokens)
        else:
            after: list[npt.NDArray[Any]] = [batch.slot_mapping, batch.seq_lens, batch.copies]
            for group, group_batch in enumerate(batch.groups[1:], 1):
                after += [group_batch.copies, *(seq.block_tables[group] for seq in seqs)]
            self._write("step", _DONE, seqs, num_new_tokens, after=after)
        return batch

    def commit(
        self,
        seqs: list[Sequence],
        sampled: npt.ArrayLike | list[npt.ArrayLike] | None = None,
    ) -> None:
        """See KVCacheManager.commit."""
        values: npt.ArrayLike = () if sampled is None else sampled  # type: ignore[assignment]
        counts: list[int] = []
        if isinstance(sampled, list) and sampled and hasattr(sampled[0], "__len__"):
            parts = [np.asarray(part, np.int32) for part in sampled]
            counts = [len(part) for part in parts]
            values = np.concatenate(parts)
        outcome = _REFUSED
        try:
            self._manager.commit(seqs, sampled)
            outcome = _DONE
        finally:
            self._write("commit", outcome, seqs, values, counts)

    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        """See KVCacheManager.truncate."""
        outcome = _REFUSED
        try:
            self._manager.truncate(seq, num_tokens)
            outcome = _DONE
        finally:
            self._write("truncate", outcome, [seq], number=num_tokens)

    def free(self, seqs: list[Sequence]) -> None:
        """See KVCacheManager.free."""
        tables = [table for seq in seqs if seq in self._births for table in seq.block_tables]
        try:
            self._manager.free(seqs)
        except ValueError:
            self._write("free", _REFUSED, seqs)
            raise
        self._write("free", _DONE, seqs, before=tables)
        for seq in seqs:
            del self._births[seq]

    def retire(self, ticket: int) -> None:
        """See KVCacheManager.retire."""
        outcome = _REFUSED
        try:
            self._manager.retire(ticket)
            outcome = _DONE
        finally:
            self._write("retire", outcome, [], number=ticket)

    def attach_store(self, store: KVStore) -> None:
        """See KVCacheManager.attach_store."""
        outcome = _REFUSED
        try:
            self._manager.attach_store(store)
            outcome = _DONE
        finally:
            self._write("attach_store", outcome, [], number=_TIERS.index(store.tier))

    def fetch(self, seq: Sequence) -> list[KVTransfer] | None:
        """See KVCacheManager.fetch."""
        try:
            loads = self._manager.fetch(seq)
        except ValueError:
            self._write("fetch", _REFUSED, [seq])
            raise
        if loads is None:
            self._write("fetch", _OUT_OF_BLOCKS, [seq])
        else:
            blocks = np.array([load.block for load in loads], np.int32)
            keys = np.array([np.frombuffer(load.key, np.int32) for load in loads], np.int32)
            tiers = [_TIERS.index(load.tier) for load in loads]
            self._write("fetch", _DONE, [seq], tiers, after=[blocks, keys])
        return loads

    def fetched(self, seq: Sequence, num_blocks: int) -> None:
        """See KVCacheManager.fetched."""
        outcome = _REFUSED
        try:
            self._manager.fetched(seq, num_blocks)
            outcome = _DONE
        finally:
            self._write("fetched", outcome, [seq], number=num_blocks)

    def swap_out(self, seq: Sequence) -> npt.NDArray[np.int32] | None:
        """See KVCacheManager.swap_out."""
        return self._swap("swap_out", self._manager.swap_out, seq)

    def swap_in(self, seq: Sequence) -> npt.NDArray[np.int32] | None:
        """See KVCacheManager.swap_in."""
        return self._swap("swap_in", self._manager.swap_in, seq)

    def _swap(
        self,
        operation: _Operation,
        run: abc.Callable[[Sequence], npt.NDArray[np.int32] | None],
        seq: Sequence,
    ) -> npt.NDArray[np.int32] | None:
        try:
            pairs = run(seq)
        except ValueError:
            self._write(operation, _REFUSED, [seq])
            raise
        if pairs is None:
            self._write(operation, _OUT_OF_BLOCKS, [seq])
        else:
            self._write(operation, _DONE, [seq], after=[pairs])
        return pairs
