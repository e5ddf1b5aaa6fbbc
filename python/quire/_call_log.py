# SPDX-License-Identifier: Apache-2.0
"""A manager that keeps a log of its calls, to run them again."""

from __future__ import annotations

import functools
import threading
from collections import abc
from typing import Any, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from ._call_log_writer import (
    DONE,
    EVICTIONS,
    OUT_OF_BLOCKS,
    REFUSED,
    TIERS,
    CallLog,
    Operation,
    Seqs,
    ids,
    is_usable,
    numbers,
)
from ._core import (
    CallLogWriter,
    KVCacheManager,
    KVStore,
    KVTransfer,
    LayerGroup,
    Sequence,
    StepBatch,
)
from ._options import INT32_MAX

_Method = TypeVar("_Method", bound=abc.Callable[..., Any])


def _in_turn(method: _Method) -> _Method:
    """One call at a time: the log has the order in which they ran."""

    @functools.wraps(method)
    def call(self: RecordedKVCacheManager, /, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return method(self, *args, **kwargs)

    return cast(_Method, call)


class RecordedKVCacheManager:
    """A KVCacheManager that writes every call that changes it, and its result, to a file.

    `path` is written anew; the other arguments and all methods are those of KVCacheManager. Each
    call is in the file when it returns. `quire.replay_calls` runs the file again, without stores:
    what fetch() found is in the log. Token ids are in the log as they are.

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
        writer = CallLogWriter(
            path,
            num_blocks,
            block_size,
            prefix_caching,
            async_depth,
            EVICTIONS.index(eviction),
            event_capacity,
            num_host_blocks,
            list(groups),
        )
        self._log = CallLog(self._manager, writer)
        self._turn = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        """Whatever changes nothing is the manager's own."""
        return getattr(self._manager, name)

    @_in_turn
    def create(
        self,
        token_ids: npt.ArrayLike,
        salt: str | None = None,
        *,
        priority: int = 0,
        ttl: float | None = None,
    ) -> Sequence:
        """See KVCacheManager.create."""
        self._log.needs_time |= ttl is not None
        self._log.set_time()
        try:
            seq = self._manager.create(token_ids, salt, priority=priority, ttl=ttl)
        except ValueError:
            self._log.write("create", REFUSED, [], token_ids, numbers(priority, ttl), salt)
            raise
        after = self._log.add(seq)
        self._log.write("create", DONE, [], token_ids, numbers(priority, ttl), salt, after=after)
        return seq

    @overload
    def fork(self, seq: Sequence) -> Sequence: ...
    @overload
    def fork(self, seq: Sequence, n: int) -> list[Sequence]: ...
    @_in_turn
    def fork(self, seq: Sequence, n: int | None = None) -> Sequence | list[Sequence]:
        """See KVCacheManager.fork."""
        self._log.set_time()
        try:
            children = self._manager.fork(seq, 1 if n is None else n)
        except ValueError:
            if n is None or 0 <= n <= INT32_MAX:  # no other call can be in a log
                self._log.write("fork", REFUSED, [seq], counts=[0] * (1 if n is None else n))
            raise
        after = [array for child in children for array in self._log.add(child)]
        self._log.write("fork", DONE, [seq], counts=[0] * len(children), after=after)
        return children[0] if n is None else children

    @_in_turn
    def step(
        self, seqs: Seqs, num_new_tokens: npt.ArrayLike, *, lookahead: int = 0
    ) -> StepBatch | None:
        """See KVCacheManager.step."""
        self._log.set_time()
        try:
            batch = self._manager.step(seqs, num_new_tokens, lookahead=lookahead)
        except ValueError:
            if is_usable(seqs):
                self._log.write("step", REFUSED, seqs, num_new_tokens, number=lookahead)
            raise
        if batch is None:
            self._log.write("step", OUT_OF_BLOCKS, seqs, num_new_tokens, number=lookahead)
        else:
            after: list[npt.NDArray[Any]] = [batch.slot_mapping, batch.seq_lens, batch.copies]
            if len(batch.groups) > 1:
                tables = [self._log.live[seq][1].block_tables for seq in ids(seqs)]
                for group, group_batch in enumerate(batch.groups[1:], 1):
                    after += [group_batch.copies, *(of_seq[group] for of_seq in tables)]
            self._log.write("step", DONE, seqs, num_new_tokens, number=lookahead, after=after)
        return batch

    @_in_turn
    def commit(
        self,
        seqs: Seqs,
        sampled: npt.ArrayLike | list[npt.ArrayLike] | None = None,
    ) -> None:
        """See KVCacheManager.commit."""
        self._log.set_time()
        values: npt.ArrayLike = () if sampled is None else sampled  # type: ignore[assignment]
        counts: list[int] = []
        if isinstance(sampled, list) and sampled and hasattr(sampled[0], "__len__"):
            parts = [np.asarray(part, np.int32) for part in sampled]
            counts = [len(part) for part in parts]
            values = np.concatenate(parts)
        try:
            self._manager.commit(seqs, sampled)
        except ValueError:
            if is_usable(seqs):
                self._log.write("commit", REFUSED, seqs, values, counts)
            raise
        self._log.write("commit", DONE, seqs, values, counts)

    @_in_turn
    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        """See KVCacheManager.truncate."""
        self._log.set_time()
        try:
            self._manager.truncate(seq, num_tokens)
        except ValueError:
            self._log.write("truncate", REFUSED, [seq], number=num_tokens)
            raise
        self._log.write("truncate", DONE, [seq], number=num_tokens)

    @_in_turn
    def free(self, seqs: Seqs) -> None:
        """See KVCacheManager.free."""
        self._log.set_time()
        named = ids(seqs) if is_usable(seqs) else []
        live = [self._log.live[seq][1] for seq in named if seq in self._log.live]
        tables = [table for seq in live for table in seq.block_tables]
        try:
            self._manager.free(seqs)
        except ValueError:
            if is_usable(seqs):
                self._log.write("free", REFUSED, seqs)
            raise
        self._log.write("free", DONE, seqs, before=tables)
        for seq in named:
            del self._log.live[seq]

    @_in_turn
    def retire(self, ticket: int) -> None:
        """See KVCacheManager.retire."""
        self._log.set_time()
        try:
            self._manager.retire(ticket)
        except ValueError:
            self._log.write("retire", REFUSED, [], number=ticket)
            raise
        self._log.write("retire", DONE, [], number=ticket)

    @_in_turn
    def attach_store(self, store: KVStore) -> None:
        """See KVCacheManager.attach_store."""
        self._log.set_time()
        try:
            self._manager.attach_store(store)
        except ValueError:
            self._log.write("attach_store", REFUSED, [], number=TIERS.index(store.tier))
            raise
        self._log.write("attach_store", DONE, [], number=TIERS.index(store.tier))

    @_in_turn
    def fetch(self, seq: Sequence) -> list[KVTransfer] | None:
        """See KVCacheManager.fetch."""
        self._log.set_time()
        try:
            loads = self._manager.fetch(seq)
        except ValueError:
            self._log.write("fetch", REFUSED, [seq])
            raise
        if loads is None:
            self._log.write("fetch", OUT_OF_BLOCKS, [seq])
        else:
            blocks = np.array([load.block for load in loads], np.int32)
            keys = np.array([np.frombuffer(load.key, np.int32) for load in loads], np.int32)
            tiers = [TIERS.index(load.tier) for load in loads]
            heads = np.frombuffer(b"".join(load.key[:8] for load in loads), np.int32)
            self._log.write("fetch", DONE, [seq], tiers, heads, after=[blocks, keys])
        return loads

    @_in_turn
    def fetched(self, seq: Sequence, num_blocks: int) -> None:
        """See KVCacheManager.fetched."""
        self._log.set_time()
        try:
            self._manager.fetched(seq, num_blocks)
        except ValueError:
            self._log.write("fetched", REFUSED, [seq], number=num_blocks)
            raise
        self._log.write("fetched", DONE, [seq], number=num_blocks)

    @_in_turn
    def pin(self, what: Sequence | npt.ArrayLike, salt: str | None = None) -> int:
        """See KVCacheManager.pin."""
        return self._change_pins("pin", self._manager.pin, what, salt)

    @_in_turn
    def unpin(self, what: Sequence | npt.ArrayLike, salt: str | None = None) -> int:
        """See KVCacheManager.unpin."""
        return self._change_pins("unpin", self._manager.unpin, what, salt)

    def _change_pins(
        self,
        operation: Operation,
        run: abc.Callable[[Sequence | npt.ArrayLike, str | None], int],
        what: Sequence | npt.ArrayLike,
        salt: str | None,
    ) -> int:
        self._log.set_time()
        is_seq = isinstance(what, Sequence)
        seqs: list[Sequence] = [what] if isinstance(what, Sequence) else []
        values: npt.ArrayLike = () if is_seq else what  # type: ignore[assignment]
        try:
            num_tokens = run(what, salt)
        except ValueError:
            self._log.write(operation, REFUSED, seqs, values, salt=salt)
            raise
        after = [np.array([num_tokens], np.int64)]
        self._log.write(operation, DONE, seqs, values, salt=None if is_seq else salt, after=after)
        return num_tokens

    @_in_turn
    def clear_cache(self) -> int:
        """See KVCacheManager.clear_cache."""
        self._log.set_time()
        num_blocks = self._manager.clear_cache()
        self._log.write("clear_cache", DONE, [], after=[np.array([num_blocks], np.int64)])
        return num_blocks

    @_in_turn
    def swap_out(self, seq: Sequence) -> npt.NDArray[np.int32] | None:
        """See KVCacheManager.swap_out."""
        return self._swap("swap_out", self._manager.swap_out, seq)

    @_in_turn
    def swap_in(self, seq: Sequence) -> npt.NDArray[np.int32] | None:
        """See KVCacheManager.swap_in."""
        return self._swap("swap_in", self._manager.swap_in, seq)

    def _swap(
        self,
        operation: Operation,
        run: abc.Callable[[Sequence], npt.NDArray[np.int32] | None],
        seq: Sequence,
    ) -> npt.NDArray[np.int32] | None:
        self._log.set_time()
        try:
            pairs = run(seq)
        except ValueError:
            self._log.write(operation, REFUSED, [seq])
            raise
        if pairs is None:
            self._log.write(operation, OUT_OF_BLOCKS, [seq])
        else:
            self._log.write(operation, DONE, [seq], after=[pairs])
        return pairs
