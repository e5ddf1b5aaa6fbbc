# SPDX-License-Identifier: Apache-2.0
"""KVCacheManager in plain Python: dictionaries and lists, no ids, no hashes, no fast paths.

A block knows how many hold it and, once cached, the whole prefix that ends in it. That is enough to
predict hits, evictions, copies, and when the blocks run out.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

Key = tuple[str | None, tuple[int, ...]]  # a salt, and all tokens up to a block's end


@dataclass(eq=False)
class Block:
    """Memory of block_size tokens."""

    refs: int = 1
    key: Key | None = None  # None: not cached
    num_tokens: int = 0


@dataclass(eq=False)
class Sequence:
    """Known tokens, of which the first `computed` have their KV."""

    tokens: list[int]
    salt: str | None
    computed: int = 0
    cached: int = 0
    planned: int = 0
    blocks: list[Block] = field(default_factory=list)


class Reference:
    """The same calls as KVCacheManager; `step` returns the number of copies, or None."""

    def __init__(self, num_blocks: int, block_size: int, caching: bool, async_depth: int) -> None:
        self.free_blocks = num_blocks
        self.size = block_size
        self.caching = caching
        self.depth = async_depth
        self.cache: dict[Key, Block] = {}
        self.idle: OrderedDict[Key, Block] = OrderedDict()  # cached, held by nobody; oldest first
        self.issued = self.retired = 0
        self.deferred: list[tuple[int, Block]] = []
        self.sequences: list[Sequence] = []

    def used_blocks(self) -> list[Block]:
        held = [block for seq in self.sequences for block in seq.blocks]
        return list({id(b): b for b in held + [b for _, b in self.deferred]}.values())

    def take(self, block: Block) -> Block:
        if block.refs == 0:
            del self.idle[block.key]
        block.refs += 1
        return block

    def drop(self, block: Block) -> None:
        block.refs -= 1
        if block.refs == 0 and block.key is not None:
            self.idle[block.key] = block
        elif block.refs == 0:
            self.free_blocks += 1

    def give_back(self, block: Block) -> None:
        if self.issued > self.retired and self.depth:
            self.deferred.append((self.issued, block))
        else:
            self.drop(block)

    def allocate(self) -> Block:
        if self.free_blocks:
            self.free_blocks -= 1
        else:
            key, _ = self.idle.popitem(last=False)
            del self.cache[key]
            longer = [k for k in self.cache if k[0] == key[0] and k[1][: len(key[1])] == key[1]]
            assert not longer, "a parent was evicted before its child"
        return Block()

    def hits(self, tokens: list[int], salt: str | None) -> list[Block]:
        found = []
        for end in range(self.size, len(tokens), self.size):
            block = self.cache.get((salt, tuple(tokens[:end])))
            if block is None:
                break
            found.append(block)
        return found

    def create(self, tokens: list[int], salt: str | None) -> Sequence:
        seq = Sequence(list(tokens), salt)
        seq.blocks = [self.take(block) for block in self.hits(tokens, salt)]
        seq.computed = seq.cached = len(seq.blocks) * self.size
        self.sequences.append(seq)
        return seq

    def step(self, seqs: list[Sequence], counts: list[int]) -> int | None:
        needed = 0
        copying: list[tuple[Sequence, bool]] = []  # and whether the reference is given up already
        for seq, count in zip(seqs, counts, strict=True):
            needed += max(0, -(-(seq.computed + count) // self.size) - len(seq.blocks))
            if count == 0 or seq.computed % self.size == 0:
                continue
            block = seq.blocks[seq.computed // self.size]
            if block.refs > 1 or block.key is not None:
                gives_up = block.refs > 1 and not self.depth
                block.refs -= gives_up
                copying.append((seq, gives_up))
        if needed + len(copying) > self.free_blocks + len(self.idle):
            for seq, gave_up in copying:
                seq.blocks[seq.computed // self.size].refs += gave_up
            return None
        self.issued += 1
        fresh = [self.allocate() for _ in range(needed + len(copying))]
        for seq, gave_up in copying:
            index = seq.computed // self.size
            source, seq.blocks[index] = seq.blocks[index], fresh.pop()
            seq.blocks[index].num_tokens = seq.computed % self.size
            if not gave_up:
                self.give_back(source)
        for seq, count in zip(seqs, counts, strict=True):
            while len(seq.blocks) * self.size < seq.computed + count:
                seq.blocks.append(fresh.pop())
            seq.planned = count
        return len(copying)

    def commit(self, seqs: list[Sequence], sampled: list[list[int]]) -> None:
        for seq, tokens in zip(seqs, sampled, strict=True):
            end = seq.computed + seq.planned
            for index in range(seq.computed // self.size, -(-end // self.size)):
                if seq.planned:
                    self.fill(seq, index, min(end - index * self.size, self.size))
            seq.computed, seq.planned = end, 0
            seq.tokens += tokens

    def fill(self, seq: Sequence, index: int, num_tokens: int) -> None:
        block = seq.blocks[index]
        block.num_tokens = num_tokens
        if num_tokens < self.size or not self.caching:
            return
        key = (seq.salt, tuple(seq.tokens[: (index + 1) * self.size]))
        if key in self.cache:
            seq.blocks[index] = self.take(self.cache[key])
            self.give_back(block)
        else:
            block.key = key
            self.cache[key] = block

    def fork(self, seq: Sequence) -> Sequence:
        shared = seq.blocks[: -(-seq.computed // self.size)]
        child = Sequence(list(seq.tokens), seq.salt, seq.computed, seq.computed)
        child.blocks = [self.take(block) for block in shared]
        self.sequences.append(child)
        return child

    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        end = min(seq.computed + seq.planned, num_tokens)
        shrinks = num_tokens < seq.computed
        del seq.tokens[num_tokens:]
        seq.computed = min(seq.computed, num_tokens)
        seq.planned = end - seq.computed
        self.trim(seq, -(-end // self.size))
        if shrinks and seq.computed % self.size:
            last = seq.blocks[seq.computed // self.size]
            if last.refs == 1 and last.key is None:
                last.num_tokens = seq.computed % self.size

    def trim(self, seq: Sequence, num_blocks: int) -> None:
        while len(seq.blocks) > num_blocks:
            self.give_back(seq.blocks.pop())

    def free(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self.trim(seq, 0)
            self.sequences.remove(seq)

    def retire(self, ticket: int) -> None:
        self.retired = ticket
        while self.deferred and self.deferred[0][0] <= ticket:
            self.drop(self.deferred.pop(0)[1])
