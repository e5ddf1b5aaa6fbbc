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
        self.victims: list[Key] | None = None  # None: the least recently used; else those given

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
            key = next(iter(self.idle)) if self.victims is None else self.victims.pop(0)
            del self.idle[key], self.cache[key]
            assert not self.children(key), "a parent was evicted before its child"
        return Block()

    def children(self, key: Key) -> list[Key]:
        """Cached blocks right behind a prefix, in the order of their tokens."""
        salt, prefix = key
        if len(prefix) % self.size:
            return []
        ends = range(len(prefix) + 1, len(prefix) + self.size + 1)
        found = [k for k in self.cache if k[0] == salt and len(k[1]) in ends]
        return sorted(k for k in found if k[1][: len(prefix)] == prefix)

    def hits(self, tokens: list[int], salt: str | None) -> tuple[list[Block], int]:
        """Blocks of the cached prefix that leaves a token to compute, and its tokens."""
        found, usable = [], tuple(tokens[:-1])
        while self.caching:
            done = len(found) * self.size
            best = self.best_child(usable[:done], usable[done : done + self.size], salt)
            if best is None:
                return found, done
            found.append(self.cache[best[0]])
            if best[1] < self.size:
                return found, done + best[1]
        return found, 0

    def best_child(
        self, prefix: tuple[int, ...], wanted: tuple[int, ...], salt: str | None
    ) -> tuple[Key, int] | None:
        """The child that begins with most of the wanted tokens, and how many those are.

        Of several the last one in order that comes before them, or else the first one behind.
        """

        def num_equal(key: Key) -> int:
            own = key[1][len(prefix) :]
            equal = [a == b for a, b in zip(own, wanted, strict=False)] + [False]
            return equal.index(False)

        children = self.children((salt, prefix))
        before = [key for key in children if key[1][len(prefix) :] < wanted][-1:]
        behind = [key for key in children if key[1][len(prefix) :] >= wanted][:1]
        best = max(before + behind, key=num_equal, default=None)  # the first of equal ones
        return None if best is None or num_equal(best) == 0 else (best, num_equal(best))

    def create(self, tokens: list[int], salt: str | None) -> Sequence:
        seq = Sequence(list(tokens), salt)
        blocks, seq.cached = self.hits(tokens, salt)
        seq.blocks = [self.take(block) for block in blocks]
        seq.computed = seq.cached
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
        short = needed + len(copying) - self.free_blocks - len(self.idle)
        last = [seq.blocks[seq.computed // self.size] for seq, gave_up in copying if not gave_up]
        in_place = [block for block in last if block.refs == 1][: max(0, short)]
        if len(in_place) < short:
            for seq, gave_up in copying:
                seq.blocks[seq.computed // self.size].refs += gave_up
            return None
        self.issued += 1
        fresh = [self.allocate() for _ in range(needed + len(copying) - len(in_place))]
        copies = 0
        for seq, gave_up in copying:
            index = seq.computed // self.size
            source = seq.blocks[index]
            if source in in_place and not gave_up:
                assert not self.children(source.key)
                del self.cache[source.key]
                source.key = None
                continue
            seq.blocks[index] = fresh.pop()
            copies += 1
            if not gave_up:
                self.give_back(source)
        for seq, count in zip(seqs, counts, strict=True):
            while len(seq.blocks) * self.size < seq.computed + count:
                seq.blocks.append(fresh.pop())
            seq.planned = count
        return copies

    def commit(self, seqs: list[Sequence], sampled: list[list[int]]) -> None:
        for seq, tokens in zip(seqs, sampled, strict=True):
            end = seq.computed + seq.planned
            for index in range(seq.computed // self.size, end // self.size):
                if seq.planned and self.caching:
                    self.publish(seq, index)
            seq.computed, seq.planned = end, 0
            seq.tokens += tokens

    def publish(self, seq: Sequence, index: int) -> None:
        block = seq.blocks[index]
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
        del seq.tokens[num_tokens:]
        seq.computed = min(seq.computed, num_tokens)
        seq.planned = end - seq.computed
        self.trim(seq, -(-end // self.size))

    def trim(self, seq: Sequence, num_blocks: int) -> None:
        while len(seq.blocks) > num_blocks:
            self.give_back(seq.blocks.pop())

    def free(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self.keep_partial_block(seq)
            self.trim(seq, 0)
            self.sequences.remove(seq)

    def keep_partial_block(self, seq: Sequence) -> None:
        index, count = divmod(seq.computed, self.size)
        if not self.caching or not count:
            return
        block, tokens = seq.blocks[index], tuple(seq.tokens[: seq.computed])
        known = [
            k for k in self.children((seq.salt, tokens[:-count])) if k[1][: len(tokens)] == tokens
        ]
        if block.refs == 1 and block.key is None and not known:
            block.key = (seq.salt, tokens)
            self.cache[block.key] = block

    def used_tokens(self) -> int:
        """Computed tokens of live sequences; of all holders of a block the longest counts."""
        held: dict[int, int] = {}
        for seq in self.sequences:
            for index, block in enumerate(seq.blocks):
                count = min(max(seq.computed - index * self.size, 0), self.size)
                held[id(block)] = max(held.get(id(block), 0), count)
        return sum(held.values())

    def retire(self, ticket: int) -> None:
        self.retired = ticket
        while self.deferred and self.deferred[0][0] <= ticket:
            self.drop(self.deferred.pop(0)[1])
