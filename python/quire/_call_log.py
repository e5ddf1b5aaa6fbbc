# SPDX-License-Identifier: Apache-2.0
"""A manager that keeps a log of its calls, to run them again."""

from __future__ import annotations

import functools
import threading
import time
from collections import abc
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args, overload

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
    "pin",
    "unpin",
    "open",
    "attach",
    "detach",
    "clear_cache",
    "set_time",
]
_OPERATIONS: tuple[_Operation, ...] = get_args(_Operation)
_EVICTIONS = ("lru", "reuse_lru")
_TIERS = ("device", "host", "file")
_DONE, _OUT_OF_BLOCKS, _REFUSED = range(3)
_Seqs: TypeAlias = "list[Sequence] | npt.NDArray[np.int64]"
_Method = TypeVar("_Method", bound=abc.Callable[..., Any])


def _ids(seqs: _Seqs) -> list[int]:
    if isinstance(seqs, list):
        return [seq.id for seq in seqs]
    ids: list[int] = np.asarray(seqs).ravel().tolist()
    return ids


def _is_usable(seqs: _Seqs) -> bool:
    """Whether the manager reads it: what it can't read changes nothing, and is not recorded."""
    if isinstance(seqs, list):
        return all(isinstance(seq, Sequence) for seq in seqs)
    array = np.asarray(seqs)
    return array.dtype == np.int64 and array.ndim == 1 and array.flags.c_contiguous


def _int32(values: npt.ArrayLike) -> list[int]:
    array: list[int] = np.asarray(values, np.int32).ravel().tolist()
    return array


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
        self._live: dict[int, tuple[int, Sequence]] = {}  # number of birth, by Sequence.id
        self._num_births = 0
        self._turn = threading.Lock()
        self._needs_time = False  # some sequence has a time to live

    def __getattr__(self, name: str) -> Any:
        """Whatever changes nothing is the manager's own."""
        return getattr(self._manager, name)

    def _write(
        self,
        operation: _Operation,
        outcome: int,
        seqs: _Seqs,
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
            [self._live[seq][0] if seq in self._live else -1 for seq in _ids(seqs)],
            _int32(values),
            _int32(counts),
            salt,
            number,
            [*(before or []), now, *(after or [])],
        )

    def _set_time(self) -> None:
        """Before a call: whatever a time to live decides is in the log, too."""
        if self._needs_time:
            now = time.monotonic_ns()
            self._manager.set_time(now)
            self._write("set_time", _DONE, [], number=now)

    def _add(self, seq: Sequence) -> list[npt.NDArray[Any]]:
        self._live[seq.id] = self._num_births, seq
        self._num_births += 1
        return self._look(seq)

    def _look(self, seq: Sequence) -> list[npt.NDArray[Any]]:
        return [np.array([seq.num_cached_tokens], np.int64), *seq.block_tables]

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
        self._needs_time |= ttl is not None
        self._set_time()
        counts = []
        if priority != 0 or ttl is not None:
            bits = np.array([np.inf if ttl is None else ttl]).view(np.int32)
            counts = [priority, *bits.tolist()]
        try:
            seq = self._manager.create(token_ids, salt, priority=priority, ttl=ttl)
        except ValueError:
            self._write("create", _REFUSED, [], token_ids, counts, salt)
            raise
        self._write("create", _DONE, [], token_ids, counts, salt, after=self._add(seq))
        return seq

    @overload
    def fork(self, seq: Sequence) -> Sequence: ...
    @overload
    def fork(self, seq: Sequence, n: int) -> list[Sequence]: ...
    @_in_turn
    def fork(self, seq: Sequence, n: int | None = None) -> Sequence | list[Sequence]:
        """See KVCacheManager.fork."""
        if n is not None and n < 0:  # no such call can be in a log; it is refused
            return self._manager.fork(seq, n)
        self._set_time()
        counts = [0] * (1 if n is None else n)
        try:
            children = self._manager.fork(seq, 1 if n is None else n)
        except ValueError:
            self._write("fork", _REFUSED, [seq], counts=counts)
            raise
        after = [array for child in children for array in self._add(child)]
        self._write("fork", _DONE, [seq], counts=counts, after=after)
        return children[0] if n is None else children

    @_in_turn
    def step(
        self, seqs: _Seqs, num_new_tokens: npt.ArrayLike, *, lookahead: int = 0
    ) -> StepBatch | None:
        """See KVCacheManager.step."""
        self._set_time()
        try:
            batch = self._manager.step(seqs, num_new_tokens, lookahead=lookahead)
        except ValueError:
            if _is_usable(seqs):
                self._write("step", _REFUSED, seqs, num_new_tokens, number=lookahead)
            raise
        if batch is None:
            self._write("step", _OUT_OF_BLOCKS, seqs, num_new_tokens, number=lookahead)
        else:
            after: list[npt.NDArray[Any]] = [batch.slot_mapping, batch.seq_lens, batch.copies]
            if len(batch.groups) > 1:
                tables = [self._live[seq][1].block_tables for seq in _ids(seqs)]
                for group, group_batch in enumerate(batch.groups[1:], 1):
                    after += [group_batch.copies, *(of_seq[group] for of_seq in tables)]
            self._write("step", _DONE, seqs, num_new_tokens, number=lookahead, after=after)
        return batch

    @_in_turn
    def commit(
        self,
        seqs: _Seqs,
        sampled: npt.ArrayLike | list[npt.ArrayLike] | None = None,
    ) -> None:
        """See KVCacheManager.commit."""
        self._set_time()
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
            if _is_usable(seqs):
                self._write("commit", outcome, seqs, values, counts)

    @_in_turn
    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        """See KVCacheManager.truncate."""
        self._set_time()
        outcome = _REFUSED
        try:
            self._manager.truncate(seq, num_tokens)
            outcome = _DONE
        finally:
            self._write("truncate", outcome, [seq], number=num_tokens)

    @_in_turn
    def free(self, seqs: _Seqs) -> None:
        """See KVCacheManager.free."""
        self._set_time()
        ids = _ids(seqs) if _is_usable(seqs) else []
        live = [self._live[seq][1] for seq in ids if seq in self._live]
        tables = [table for seq in live for table in seq.block_tables]
        try:
            self._manager.free(seqs)
        except ValueError:
            if _is_usable(seqs):
                self._write("free", _REFUSED, seqs)
            raise
        self._write("free", _DONE, seqs, before=tables)
        for seq in ids:
            del self._live[seq]

    @_in_turn
    def retire(self, ticket: int) -> None:
        """See KVCacheManager.retire."""
        self._set_time()
        outcome = _REFUSED
        try:
            self._manager.retire(ticket)
            outcome = _DONE
        finally:
            self._write("retire", outcome, [], number=ticket)

    @_in_turn
    def attach_store(self, store: KVStore) -> None:
        """See KVCacheManager.attach_store."""
        self._set_time()
        outcome = _REFUSED
        try:
            self._manager.attach_store(store)
            outcome = _DONE
        finally:
            self._write("attach_store", outcome, [], number=_TIERS.index(store.tier))

    @_in_turn
    def fetch(self, seq: Sequence) -> list[KVTransfer] | None:
        """See KVCacheManager.fetch."""
        self._set_time()
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
            heads = np.frombuffer(b"".join(load.key[:8] for load in loads), np.int32)
            self._write("fetch", _DONE, [seq], tiers, heads, after=[blocks, keys])
        return loads

    @_in_turn
    def fetched(self, seq: Sequence, num_blocks: int) -> None:
        """See KVCacheManager.fetched."""
        self._set_time()
        outcome = _REFUSED
        try:
            self._manager.fetched(seq, num_blocks)
            outcome = _DONE
        finally:
            self._write("fetched", outcome, [seq], number=num_blocks)

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
        operation: _Operation,
        run: abc.Callable[[Sequence | npt.ArrayLike, str | None], int],
        what: Sequence | npt.ArrayLike,
        salt: str | None,
    ) -> int:
        self._set_time()
        is_seq = isinstance(what, Sequence)
        seqs: list[Sequence] = [what] if isinstance(what, Sequence) else []
        values: npt.ArrayLike = () if is_seq else what  # type: ignore[assignment]
        try:
            num_tokens = run(what, salt)
        except ValueError:
            self._write(operation, _REFUSED, seqs, values, salt=salt)
            raise
        after = [np.array([num_tokens], np.int64)]
        self._write(operation, _DONE, seqs, values, salt=None if is_seq else salt, after=after)
        return num_tokens

    @_in_turn
    def clear_cache(self) -> int:
        """See KVCacheManager.clear_cache."""
        self._set_time()
        num_blocks = self._manager.clear_cache()
        self._write("clear_cache", _DONE, [], after=[np.array([num_blocks], np.int64)])
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
        operation: _Operation,
        run: abc.Callable[[Sequence], npt.NDArray[np.int32] | None],
        seq: Sequence,
    ) -> npt.NDArray[np.int32] | None:
        self._set_time()
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
