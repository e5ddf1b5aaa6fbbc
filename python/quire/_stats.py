# SPDX-License-Identifier: Apache-2.0
"""Statistics of a KVCacheManager."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ._prometheus import prometheus


@dataclasses.dataclass(frozen=True)
class KVCacheStats:
    """Counts of KVCacheManager.stats(); free + used + cached blocks are all blocks.

    Hits, evictions, lost events and the like are counted since the start.

    Example::

        stats = manager.stats()
        hit_rate = stats.prefix_hit_tokens / stats.prefix_query_tokens
    """

    num_blocks: int
    block_size: int  #: tokens
    free_blocks: int
    used_blocks: int  #: that sequences hold
    cached_blocks: int  #: that nobody holds, kept for their contents
    high_water_blocks: int  #: most blocks ever used at once
    deferred_refs: int  #: references that wait for retire()
    used_tokens: int  #: computed tokens of live sequences and pins, in shared blocks once
    waste_tokens: int  #: room in used blocks beyond those
    prefix_query_tokens: int  #: asked of the prefix cache by create(),
    prefix_hit_tokens: int  #: found in it,
    host_hit_tokens: int  #: fetched from the store in host memory,
    file_hit_tokens: int  #: and from that of files
    evicted_blocks: int  #: cached blocks whose contents were given up
    pinned_blocks: int  #: of the used ones, those that pin() holds
    fenced_blocks: int  #: of the used ones, those that wait for retire() alone
    num_host_blocks: int  #: for sequences that are swapped out,
    swapped_blocks: int  #: and how many of them are taken
    lost_events: int  #: that nobody took in time
    num_bytes: int  #: of the manager's own books: 64 a block of 16 tokens

    def __getitem__(self, name: str) -> int:
        """The count of a name."""
        return self._asdict()[name]

    def _asdict(self) -> dict[str, int]:
        """All counts by name."""
        return dataclasses.asdict(self)

    def prometheus(self, prefix: str = "quire_kv", labels: Mapping[str, str] | None = None) -> str:
        """The text exposition of all counts; see `quire.prometheus`.

        Example::

            text = manager.stats().prometheus(labels={"model": "llama-3-8b"})
        """
        return prometheus(self._asdict(), prefix, labels)
