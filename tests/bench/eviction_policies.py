# SPDX-License-Identifier: Apache-2.0
"""Eviction policies for a prefix cache, as plain models.

A policy sees the blocks of one request at a time, from the deepest to the root, so that a block
always comes before its parent. `victim` gives up a block of which no child is cached.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

# may_go(block): no child of it is cached, and the running request does not use it.
MayGo = Callable[[int], bool]


class Policy:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def admit(self, block: int, parent: int) -> None:
        """Come before `insert`, from the root down: for policies that look at the parent."""

    def insert(self, block: int) -> None:
        raise NotImplementedError

    def touch(self, block: int) -> None:
        raise NotImplementedError

    def victim(self, may_go: MayGo) -> int:
        """Forget a block and return it."""
        raise NotImplementedError


def first(queue: Iterable[int], may_go: MayGo) -> int | None:
    return next((block for block in queue if may_go(block)), None)


class LRU(Policy):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queue: OrderedDict[int, None] = OrderedDict()

    def insert(self, block: int) -> None:
        self.queue[block] = None

    def touch(self, block: int) -> None:
        self.queue.move_to_end(block)

    def victim(self, may_go: MayGo) -> int:
        block = first(self.queue, may_go)
        assert block is not None
        del self.queue[block]
        return block


class SLRU(Policy):
    """Blocks that were hit once live in a protected queue of a share of the capacity."""

    share = 0.8

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.probation: OrderedDict[int, None] = OrderedDict()
        self.protected: OrderedDict[int, None] = OrderedDict()

    def insert(self, block: int) -> None:
        self.probation[block] = None

    def touch(self, block: int) -> None:
        self.probation.pop(block, None)
        self.protected[block] = None
        self.protected.move_to_end(block)
        if len(self.protected) > self.share * self.capacity:
            self.probation[self.protected.popitem(last=False)[0]] = None

    def victim(self, may_go: MayGo) -> int:
        for queue in (self.probation, self.protected):
            block = first(queue, may_go)
            if block is not None:
                del queue[block]
                return block
        raise AssertionError


class GhostSLRU(SLRU):
    """SLRU that remembers as many evicted blocks: one that comes back is protected at once."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.ghosts: OrderedDict[int, None] = OrderedDict()

    def insert(self, block: int) -> None:
        if self.ghosts.pop(block, 0) is None:
            self.touch(block)
        else:
            super().insert(block)

    def victim(self, may_go: MayGo) -> int:
        block = super().victim(may_go)
        self.ghosts[block] = None
        if len(self.ghosts) > self.capacity:
            self.ghosts.popitem(last=False)
        return block


class S3FIFO(Policy):
    """A small queue (10 %) for new blocks, a main queue with second chances, ghosts."""

    small_share = 0.1

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.small: OrderedDict[int, None] = OrderedDict()
        self.main: OrderedDict[int, None] = OrderedDict()
        self.ghosts: OrderedDict[int, None] = OrderedDict()
        self.frequency: dict[int, int] = {}

    def insert(self, block: int) -> None:
        queue = self.main if self.ghosts.pop(block, 0) is None else self.small
        queue[block] = None
        self.frequency[block] = 0

    def touch(self, block: int) -> None:
        self.frequency[block] = min(3, self.frequency[block] + 1)

    def forget(self, block: int) -> int:
        del self.frequency[block]
        return block

    def from_small(self, may_go: MayGo) -> int | None:
        for _ in range(len(self.small)):
            block = next(iter(self.small))
            if self.frequency[block] > 0:
                del self.small[block]
                self.main[block] = None
                self.frequency[block] = 0
            elif may_go(block):
                del self.small[block]
                self.ghosts[block] = None
                if len(self.ghosts) > self.capacity:
                    self.ghosts.popitem(last=False)
                return self.forget(block)
            else:
                self.small.move_to_end(block)
        return None

    def from_main(self, may_go: MayGo) -> int | None:
        for _ in range(5 * len(self.main)):
            block = next(iter(self.main))
            if self.frequency[block] == 0 and may_go(block):
                del self.main[block]
                return self.forget(block)
            self.frequency[block] = max(0, self.frequency[block] - 1)
            self.main.move_to_end(block)
        return None

    def victim(self, may_go: MayGo) -> int:
        parts = [self.from_small, self.from_main]
        if len(self.small) <= self.small_share * self.capacity:
            parts.reverse()
        for part in parts:
            block = part(may_go)
            if block is not None:
                return block
        raise AssertionError


class Ranked(Policy):
    """Gives up the block of the lowest rank; a heap, with stale entries left in it."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.time = 0
        self.ranks: dict[int, tuple[float, ...]] = {}
        self.heap: list[tuple[tuple[float, ...], int]] = []

    def rank(self, block: int, is_new: bool) -> tuple[float, ...]:
        raise NotImplementedError

    def insert(self, block: int) -> None:
        self.put(block, True)

    def touch(self, block: int) -> None:
        self.put(block, False)

    def put(self, block: int, is_new: bool) -> None:
        self.time += 1
        self.ranks[block] = self.rank(block, is_new)
        heapq.heappush(self.heap, (self.ranks[block], block))

    def victim(self, may_go: MayGo) -> int:
        passed = []
        while True:
            rank, block = heapq.heappop(self.heap)
            if self.ranks.get(block) != rank:
                continue
            if may_go(block):
                break
            passed.append((rank, block))
        for entry in passed:
            heapq.heappush(self.heap, entry)
        del self.ranks[block]
        return block


class LFU(Ranked):
    """Least hits first; hits are forgotten with the block."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.counts: dict[int, int] = {}

    def rank(self, block: int, is_new: bool) -> tuple[float, ...]:
        self.counts[block] = 0 if is_new else self.counts[block] + 1
        return (self.counts[block], self.time)


class TinyLFU(LFU):
    """Hits are remembered beyond eviction, and halved every 10 x capacity accesses."""

    def rank(self, block: int, is_new: bool) -> tuple[float, ...]:
        if self.time % (10 * self.capacity) == 0:
            self.counts = {b: n // 2 for b, n in self.counts.items() if n > 1}
        self.counts[block] = min(15, self.counts.get(block, 0) + 1)
        return (self.counts[block], self.time)


class ReuseLRU(Policy):
    """Classes by number of uses, LRU in each; of the oldest of each class the one goes whose age,
    divided by the weight of its class, is the greatest. Evicted blocks are remembered."""

    weights = (1, 2, 3, 4)
    memory = 2  # evicted blocks remembered, in capacities

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queues: list[OrderedDict[int, int]] = [OrderedDict() for _ in self.weights]
        self.classes: dict[int, int] = {}
        self.ghosts: OrderedDict[int, int] = OrderedDict()
        self.time = 0

    def admit(self, block: int, parent: int) -> None:
        top = len(self.weights) - 1
        recalled = min(top, self.ghosts.pop(block, -1) + 1)
        self.classes[block] = min(recalled, self.classes.get(parent, top))

    def insert(self, block: int) -> None:
        self.time += 1
        self.queues[self.classes[block]][block] = self.time

    def touch(self, block: int) -> None:
        before = self.classes[block]
        del self.queues[before][block]
        self.classes[block] = min(before + 1, len(self.weights) - 1)
        self.insert(block)

    def victim(self, may_go: MayGo) -> int:
        oldest = [
            ((self.time - queue[block]) / weight, -weight, block)
            for queue, weight in zip(self.queues, self.weights, strict=True)
            if (block := first(queue, may_go)) is not None
        ]
        block = max(oldest)[2]
        reuse = self.classes.pop(block)
        del self.queues[reuse][block]
        self.ghosts[block] = reuse
        if len(self.ghosts) > self.memory * self.capacity:
            self.ghosts.popitem(last=False)
        return block


class Belady(Ranked):
    """The bound: gives up the block whose next use is farthest. Knows the future."""

    def __init__(self, capacity: int, requests: list[list[int]]) -> None:
        super().__init__(capacity)
        self.uses: dict[int, deque[int]] = {}
        for time, blocks in enumerate(requests):
            for block in blocks:
                self.uses.setdefault(block, deque()).append(time)

    def rank(self, block: int, is_new: bool) -> tuple[float, ...]:
        uses = self.uses[block]
        uses.popleft()  # the one that is now
        return (-uses[0] if uses else float("-inf"), self.time)
