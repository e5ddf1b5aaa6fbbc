# SPDX-License-Identifier: Apache-2.0
"""KVCacheManager with layer groups in plain Python: one dictionary of cached blocks, one order."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

Key = tuple[int, str | None, tuple[int, ...]]  # a group, a salt, and all tokens to a block's end


@dataclass(eq=False)
class Block:
    """Memory of block_size tokens, or of a state."""

    refs: int = 1
    key: Key | None = None  # None: not cached


@dataclass(eq=False)
class Sequence:
    """Known tokens, of which the first `computed` have their KV; a table for each group."""

    tokens: list[int]
    salt: str | None
    tables: list[list[Block | None]]
    computed: int = 0
    planned: int = 0
    behind: list[int] = field(default_factory=list)
    swapped: int = 0  # tokens that were computed when it left for host memory
    host_blocks: int = 0  # what it holds there


class GroupReference:
    """The same calls as KVCacheManager; `groups`: pairs of kind and size, the first full."""

    def __init__(
        self, num_blocks: int, block_size: int, caching: bool, depth: int, groups: list
    ) -> None:
        self.free_blocks, self.size, self.caching, self.depth = (
            num_blocks,
            block_size,
            caching,
            depth,
        )
        self.groups = groups
        self.cache: dict[Key, Block] = {}
        self.idle: OrderedDict[Key, Block] = OrderedDict()  # cached, held by nobody; oldest first
        self.issued = self.retired = 0
        self.deferred: list[tuple[int, Block]] = []
        self.sequences: list[Sequence] = []
        self.free_host_blocks = 0

    def is_state(self, group: int) -> bool:
        return self.groups[group][0] == "state"

    def first_needed(self, group: int, num_tokens: int) -> int:
        """The first block that a token at position num_tokens reads or writes."""
        kind, size = self.groups[group]
        if kind == "sliding_window":
            return max(0, num_tokens - size + 1) // self.size
        if kind == "chunked_local":
            return num_tokens // size * size // self.size
        return max(0, num_tokens - 1) // self.size if kind == "state" else 0

    def key(self, group: int, seq_tokens: list[int], salt: str | None, index: int) -> Key:
        return (group, salt, tuple(seq_tokens[: (index + 1) * self.size]))

    def used_blocks(self) -> list[Block]:
        held = [b for seq in self.sequences for table in seq.tables for b in table if b]
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
            return Block()
        group, salt, prefix = next(iter(self.idle))
        if group == 0:  # what hangs on it goes before it
            assert not any(
                k[0] == 0
                and k[1] == salt
                and len(k[2]) > len(prefix)
                and k[2][: len(prefix)] == prefix
                for k in self.cache
            ), "a parent was evicted before its child"
            hanging = [g for g in range(1, len(self.groups)) if (g, salt, prefix) in self.cache]
            group = hanging[0] if hanging else 0
        del self.idle[group, salt, prefix], self.cache[group, salt, prefix]
        return Block()

    def hits(self, tokens: list[int], salt: str | None) -> tuple[list[list[Block | None]], int]:
        """The tables to begin with: the longest prefix that leaves a token to compute and of which
        every group has all that it needs."""
        for count in range((len(tokens) - 1) // self.size if self.caching else 0, 0, -1):
            tables: list[list[Block | None]] = []
            for group in range(len(self.groups)):
                first = self.first_needed(group, count * self.size)
                keys = [self.key(group, tokens, salt, i) for i in range(first, count)]
                if not all(key in self.cache for key in keys):
                    break
                behind = 0 if self.is_state(group) else first
                tables.append([None] * behind + [self.cache[key] for key in keys])
            else:
                return tables, count * self.size
        return [[] for _ in self.groups], 0

    def begin(self, seq: Sequence) -> None:
        tables, seq.computed = self.hits(seq.tokens, seq.salt)
        seq.tables = [[b and self.take(b) for b in table] for table in tables]

    def create(self, tokens: list[int], salt: str | None) -> Sequence:
        seq = Sequence(list(tokens), salt, [])
        self.begin(seq)
        self.sequences.append(seq)
        return seq

    def last_index(self, seq: Sequence, group: int) -> int | None:
        """The entry that the next token is written to, if it is there and holds something."""
        if self.is_state(group):
            return 0 if seq.computed else None
        return seq.computed // self.size if seq.computed % self.size else None

    def num_entries(self, group: int, end: int) -> int:
        return int(end > 0) if self.is_state(group) else -(-end // self.size)

    def step(self, seqs: list[Sequence], counts: list[int]) -> int | None:
        needed = 0
        copying: list[tuple[Sequence, int, int, bool]] = []  # ..., whether its hold is given up
        for seq, count in zip(seqs, counts, strict=True):
            for group, table in enumerate(seq.tables):
                needed += max(0, self.num_entries(group, seq.computed + count) - len(table))
                index = self.last_index(seq, group)
                if count == 0 or index is None:
                    continue
                block = table[index]
                if block.refs > 1 or block.key is not None:
                    gives_up = block.refs > 1 and not self.depth
                    block.refs -= gives_up
                    copying.append((seq, group, index, gives_up))
        short = needed + len(copying) - self.free_blocks - len(self.idle)
        alone = [
            entry
            for entry in copying
            if not entry[3] and entry[0].tables[entry[1]][entry[2]].refs == 1
        ][: max(0, short)]
        if len(alone) < short:
            for seq, group, index, gave_up in copying:
                seq.tables[group][index].refs += gave_up
            return None
        self.issued += 1
        fresh = [self.allocate() for _ in range(needed + len(copying) - len(alone))]
        for entry in copying:
            seq, group, index, gave_up = entry
            source = seq.tables[group][index]
            if entry in alone:
                self.forget(source)
                continue
            seq.tables[group][index] = fresh.pop()
            if not gave_up:
                self.give_back(source)
        for seq, count in zip(seqs, counts, strict=True):
            for group, table in enumerate(seq.tables):
                while len(table) < self.num_entries(group, seq.computed + count):
                    table.append(fresh.pop())
            seq.planned = count
        return len(copying) - len(alone)

    def forget(self, source: Block) -> None:
        """A cached block that its only holder is about to write to, and what hangs on it."""
        if source.key is None:
            return
        group, salt, prefix = source.key
        for g in range(len(self.groups)) if group == 0 else [group]:
            if (g, salt, prefix) in self.cache:
                self.cache.pop((g, salt, prefix)).key = None

    def commit(self, seqs: list[Sequence], sampled: list[list[int]]) -> None:
        for seq, tokens in zip(seqs, sampled, strict=True):
            end = seq.computed + seq.planned
            for group in range(len(self.groups)) if seq.planned else []:
                if self.is_state(group):
                    full = [end // self.size - 1] if end % self.size == 0 else []
                else:
                    full = list(range(seq.computed // self.size, end // self.size))
                for index in full if self.caching else []:
                    self.publish(seq, group, index)
                if not self.is_state(group):
                    self.give_back_behind(seq, group, end)
            seq.computed, seq.planned = end, 0
            seq.tokens += tokens

    def publish(self, seq: Sequence, group: int, index: int) -> None:
        table, entry = seq.tables[group], 0 if self.is_state(group) else index
        key = self.key(group, seq.tokens, seq.salt, index)
        if key not in self.cache:
            table[entry].key = key
            self.cache[key] = table[entry]
        elif self.cache[key] is not table[entry]:
            own, table[entry] = table[entry], self.take(self.cache[key])
            self.give_back(own)

    def give_back_behind(self, seq: Sequence, group: int, num_tokens: int) -> None:
        for i in range(self.first_needed(group, num_tokens)):
            if seq.tables[group][i] is not None:
                self.give_back(seq.tables[group][i])
                seq.tables[group][i] = None

    def fork(self, seq: Sequence) -> Sequence:
        child = Sequence(list(seq.tokens), seq.salt, [], seq.computed)
        for group, table in enumerate(seq.tables):
            shared = table[: self.num_entries(group, seq.computed)]
            child.tables.append([b and self.take(b) for b in shared])
        self.sequences.append(child)
        return child

    def reaches(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether every group can go on behind so many tokens."""
        computed = min(seq.computed, num_tokens)
        return all(
            num_tokens >= seq.computed + seq.planned
            if self.is_state(group)
            else None not in table[self.first_needed(group, computed) :]
            for group, table in enumerate(seq.tables)
        )

    def truncate(self, seq: Sequence, num_tokens: int) -> None:
        if not self.reaches(seq, num_tokens):
            self.trim(seq, 0)
            del seq.tokens[num_tokens:]
            seq.planned = 0
            self.begin(seq)
            return
        end = min(seq.computed + seq.planned, num_tokens)
        del seq.tokens[num_tokens:]
        seq.computed = min(seq.computed, num_tokens)
        seq.planned = end - seq.computed
        self.trim(seq, end)

    def trim(self, seq: Sequence, end: int) -> None:
        for group, table in enumerate(seq.tables):
            while len(table) > self.num_entries(group, end):
                block = table.pop()
                if block is not None:
                    self.give_back(block)

    def free(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self.trim(seq, 0)
            self.leave_host(seq)
            self.sequences.remove(seq)

    def needed(self, group: int, computed: int) -> range:
        """The entries of a table that a sequence goes on from."""
        end = self.num_entries(group, computed)
        return range(
            0 if self.is_state(group) else min(end, self.first_needed(group, computed)), end
        )

    def swap_out(self, seq: Sequence) -> int | None:
        """How many blocks were moved."""
        count = sum(len(self.needed(group, seq.computed)) for group in range(len(self.groups)))
        if count > self.free_host_blocks:
            return None
        self.free_host_blocks -= count
        seq.swapped, seq.host_blocks = seq.computed, count
        self.trim(seq, 0)
        seq.computed = seq.planned = 0
        return count

    def swap_in(self, seq: Sequence) -> int | None:
        """How many blocks were copied: all but what is cached still."""
        whole = seq.swapped // self.size
        path = 0
        while path < whole and self.key(0, seq.tokens, seq.salt, path) in self.cache:
            path += 1
        tables: list[list[Block | None]] = []
        for group in range(len(self.groups)):
            tables.append([])
            for index in self.needed(group, seq.swapped):
                node = index
                if self.is_state(group):
                    node = whole - 1 if seq.swapped % self.size == 0 else whole
                key = self.key(group, seq.tokens, seq.salt, node)
                tables[group].append(self.cache.get(key) if node < path else None)
        found = [block for table in tables for block in table if block]
        missing = sum(table.count(None) for table in tables)
        if missing > self.free_blocks + len(self.idle) - sum(b.refs == 0 for b in found):
            return None
        for block in found:
            self.take(block)
        tables = [[block or self.allocate() for block in table] for table in tables]
        for group, table in enumerate(tables):
            behind = 0 if self.is_state(group) else self.needed(group, seq.swapped).start
            seq.tables[group] = [None] * behind + table
        for group in range(len(self.groups)) if self.caching else []:
            if not self.is_state(group):
                for index in range(self.needed(group, seq.swapped).start, whole):
                    self.publish(seq, group, index)
            elif whole and seq.swapped % self.size == 0:
                self.publish(seq, group, whole - 1)
        seq.computed, seq.swapped = seq.swapped, 0
        self.leave_host(seq)
        return missing

    def leave_host(self, seq: Sequence) -> None:
        self.free_host_blocks += seq.host_blocks
        seq.host_blocks = 0

    def used_tokens(self) -> int:
        """Computed tokens, a state as a full block; of a block's holders the longest counts."""
        held: dict[int, int] = {}
        for seq in self.sequences:
            for group, table in enumerate(seq.tables):
                for index, block in enumerate(table):
                    count = min(max(seq.computed - index * self.size, 0), self.size)
                    count = self.size if self.is_state(group) else count
                    if block:
                        held[id(block)] = max(held.get(id(block), 0), count)
        return sum(held.values())

    def retire(self, ticket: int) -> None:
        self.retired = ticket
        while self.deferred and self.deferred[0][0] <= ticket:
            self.drop(self.deferred.pop(0)[1])
