# SPDX-License-Identifier: Apache-2.0
"""How a call of a manager stands in its log, whose format the core's call_log.h has."""

from __future__ import annotations

import time
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ._core import CallLogWriter, KVCacheManager, Sequence

# In the order of the core's LoggedCall::Operation, Eviction and CacheTier.
Operation = Literal[
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
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
EVICTIONS = ("lru", "reuse_lru")
TIERS = ("device", "host", "file")
DONE, OUT_OF_BLOCKS, REFUSED = range(3)
Seqs: TypeAlias = "list[Sequence] | npt.NDArray[np.int64]"


def ids(seqs: Seqs) -> list[int]:
    """What a call names, as Sequence.id."""
    if isinstance(seqs, list):
        return [seq.id for seq in seqs]
    numbers: list[int] = np.asarray(seqs).ravel().tolist()
    return numbers


def is_usable(seqs: Seqs) -> bool:
    """Whether the manager reads it: what it can't read changes nothing, and is not recorded."""
    if isinstance(seqs, list):
        return all(isinstance(seq, Sequence) for seq in seqs)
    array = np.asarray(seqs)
    return array.dtype == np.int64 and array.ndim == 1 and array.flags.c_contiguous


def _int32(values: npt.ArrayLike) -> list[int]:
    array: list[int] = np.asarray(values, np.int32).ravel().tolist()
    return array


def numbers(priority: int, ttl: float | None) -> list[int]:
    """How long the blocks of a sequence are worth keeping; nothing where it is as usual."""
    if priority == 0 and ttl is None:
        return []
    bits: list[int] = np.array([np.inf if ttl is None else ttl]).view(np.int32).tolist()
    return [priority, *bits]


class CallLog:
    """The log of one manager. Sequences are in it by their number of birth, from 0."""

    def __init__(self, manager: KVCacheManager, writer: CallLogWriter) -> None:
        """Write calls of `manager` to `writer`."""
        self.live: dict[int, tuple[int, Sequence]] = {}  # number of birth, by Sequence.id
        self.needs_time = False  # some sequence has a time to live
        self._manager = manager
        self._writer = writer
        self._num_births = 0

    def write(
        self,
        operation: Operation,
        outcome: int,
        seqs: Seqs,
        values: npt.ArrayLike = (),
        counts: npt.ArrayLike = (),
        salt: str | None = None,
        number: int = 0,
        before: list[npt.NDArray[Any]] | None = None,
        after: list[npt.NDArray[Any]] | None = None,
    ) -> None:
        """A call, and what a manager that makes it again must show: `before`, counts, `after`."""
        m = self._manager
        try:
            int32_values, int32_counts = _int32(values), _int32(counts)
            int64_number = int(np.int64(number))
        except OverflowError:
            return  # the manager, which takes no larger ones, has refused the call: nothing changed
        now = np.array([m.num_free_blocks, m.num_used_blocks, m.num_cached_blocks], np.int32)
        self._writer.write(
            OPERATIONS.index(operation),
            outcome,
            [self.live[seq][0] if seq in self.live else -1 for seq in ids(seqs)],
            int32_values,
            int32_counts,
            salt,
            int64_number,
            [*(before or []), now, *(after or [])],
        )

    def set_time(self) -> None:
        """Before a call: whatever a time to live decides is in the log, too."""
        if self.needs_time:
            now = time.monotonic_ns()
            self._manager.set_time(now)
            self.write("set_time", DONE, [], number=now)

    def add(self, seq: Sequence) -> list[npt.NDArray[Any]]:
        """A new sequence; returns what shows that it is the right one."""
        self.live[seq.id] = self._num_births, seq
        self._num_births += 1
        return [np.array([seq.num_cached_tokens], np.int64), *seq.block_tables]
