# SPDX-License-Identifier: Apache-2.0
"""quire behind the engine interface of a benchmark of KV cache managers (--engine module:Class).

The interface calls one request at a time and passes Python lists; batches are gathered here.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import quire


class Request:
    """A request: its tokens, and its sequence while it holds blocks."""

    def __init__(self, tokens: list[int]) -> None:
        """A request of these prompt tokens."""
        self.toks = array("i", tokens)
        self.tokens = np.frombuffer(self.toks, np.int32)
        self.seq: Any = None
        self.len_computed = 0


class QuireEngine:
    """KVCacheManager, called as engines call it: a step and a commit for the whole batch."""

    name = "quire"
    hash_algorithms = ()  # blocks are found by their tokens

    def __init__(self, num_blocks: int, block_size: int = 16, caching: bool = True) -> None:
        """A pool without requests."""
        self.block_size = block_size
        self.manager = quire.KVCacheManager(num_blocks, block_size, prefix_caching=caching)
        self._batch: list[Request] = []
        self._ids = np.empty(0, np.int64)
        self._ones = np.ones(4096, np.int32)

    def request(self, rid: str, tokens: list[int]) -> Request:
        del rid
        return Request(tokens)

    def match(self, r: Request) -> int:
        return self.manager.match(r.tokens)

    def admit(self, r: Request, n_new: int) -> bool:
        r.seq = self.manager.create(r.tokens)
        if self.manager.step([r.seq], [n_new]) is None:
            self.manager.free([r.seq])
            return False
        r.len_computed = r.seq.num_cached_tokens + n_new
        return True

    def extend(self, r: Request, n_new: int) -> bool:
        self.manager.commit([r.seq])
        if self.manager.step([r.seq], [n_new]) is None:
            return False
        r.len_computed += n_new
        return True

    def prefill_done(self, r: Request) -> None:
        self.manager.commit([r.seq])

    def _ids_of(self, rs: list[Request]) -> np.ndarray:
        if rs != self._batch:
            self._batch = list(rs)
            self._ids = np.array([r.seq.id for r in rs], np.int64)
        return self._ids

    def step(self, rs: list[Request], changed: bool) -> int:
        if changed:
            self._batch = []
        ids = self._ids_of(rs)
        count = len(rs)
        if self.manager.step(ids, self._ones[:count]) is None:
            fits, count = 0, count - 1
            while fits < count:  # the most leading requests that get a slot
                middle = (fits + count + 1) // 2
                if self.manager.step(ids[:middle], self._ones[:middle]) is None:
                    count = middle - 1
                else:
                    fits = middle
        for r in rs[:count]:
            r.len_computed += 1
        return count

    def push(self, rs: list[Request], toks: list[int]) -> None:
        self.manager.commit(self._ids_of(rs), np.array(toks, np.int32))

    def free(self, r: Request) -> None:
        r.tokens = r.seq.token_ids
        self.manager.free([r.seq])

    def restart(self, r: Request) -> None:
        r.len_computed = 0

    def num_free_blocks(self) -> int:
        return self.manager.num_free_blocks + self.manager.num_cached_blocks

    def block_ids(self, r: Request) -> list[int]:
        return r.seq.block_table.tolist()

    def hash_tokens(self, algo: str, tokens: list[int]) -> int:
        raise NotImplementedError

    def fork(self, r: Request, n: int) -> list[Request]:
        self.manager.commit([r.seq])
        children = []
        for seq in self.manager.fork(r.seq, n):
            child = Request([])
            child.seq, child.len_computed = seq, r.len_computed
            children.append(child)
        self.manager.commit([child.seq for child in children], self._ones[:n])
        return children
