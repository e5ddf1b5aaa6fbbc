# SPDX-License-Identifier: Apache-2.0
"""Statistics in the text exposition format of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

# name in stats() -> (type, help). What is not listed is a gauge without help.
_KNOWN = {
    "num_blocks": ("gauge", "Blocks."),
    "block_size": ("gauge", "Tokens a block."),
    "free_blocks": ("gauge", "Blocks neither used nor cached."),
    "used_blocks": ("gauge", "Blocks that sequences hold, each counted once."),
    "cached_blocks": ("gauge", "Blocks that no sequence holds, kept for their contents."),
    "high_water_blocks": ("gauge", "Most blocks ever used at once."),
    "deferred_refs": ("gauge", "References that wait for a running step."),
    "used_tokens": ("gauge", "Tokens in used blocks, shared ones counted once."),
    "waste_tokens": ("gauge", "Room in used blocks that holds nothing."),
    "prefix_query_tokens": ("counter", "Tokens looked up in the prefix cache."),
    "prefix_hit_tokens": ("counter", "Tokens found in the prefix cache."),
    "host_hit_tokens": ("counter", "Tokens fetched from the store in host memory."),
    "file_hit_tokens": ("counter", "Tokens fetched from the store of files."),
    "num_host_blocks": ("gauge", "Blocks of host memory for swapped sequences."),
    "swapped_blocks": ("gauge", "Blocks of host memory that swapped sequences hold."),
    "lost_events": ("counter", "Events that nobody took in time."),
    "evicted_blocks": ("counter", "Cached blocks whose contents were given up for room."),
    "pinned_blocks": ("gauge", "Used blocks that a pin holds."),
    "fenced_blocks": ("gauge", "Used blocks that wait for a running step alone."),
    "num_bytes": ("gauge", "Memory of the manager's own books."),
    "capacity_blocks": ("gauge", "Blocks that fit."),
    "num_pending": ("gauge", "Requests taken and not completed."),
    "stored": ("counter", "Blocks written."),
    "hits": ("counter", "Gets that delivered a block."),
    "misses": ("counter", "Gets that found nothing."),
    "evicted": ("counter", "Blocks given up for room."),
    "not_taken": ("counter", "Requests refused because the queue was full."),
    "failed": ("counter", "Puts that ended in an error of the medium."),
    "dropped": ("counter", "Blocks found torn or rotten, never delivered."),
    "callback_errors": ("counter", "Callbacks that threw."),
}


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _is_label(name: str) -> bool:
    return name.isascii() and name.isidentifier() and not name.startswith("__")


def prometheus(
    stats: Mapping[str, int | float],
    prefix: str = "quire_kv",
    labels: Mapping[str, str] | None = None,
) -> str:
    r"""The text exposition (version 0.0.4) of what a `stats()` returns, one metric a key.

    `stats` is the result of KVStore.stats() or any other counts by name (those of a manager write
    themselves: KVCacheStats.prometheus). Counts since the start
    become counters, whose names end in ``_total``, all others gauges. `labels` go to every metric.

    Raises ValueError for a prefix or label that Prometheus does not allow.

    Example::

        text = quire.prometheus(store.stats(), "quire_store", labels={"model": "llama-3-8b"})
        # quire_store_num_blocks{model="llama-3-8b"} 4096 ...
    """
    if not _is_label(prefix):
        raise ValueError(f"prometheus: prefix: expected letters, digits and _, got {prefix!r}")
    for label in labels or {}:
        if not _is_label(label):
            raise ValueError(f"prometheus: labels: expected letters, digits and _, got {label!r}")
    pairs = ",".join(f'{name}="{_escape(value)}"' for name, value in (labels or {}).items())
    lines = []
    for name, value in stats.items():
        kind, text = _KNOWN.get(name, ("gauge", ""))
        metric = f"{prefix}_{name}" + ("_total" if kind == "counter" else "")
        if text:
            lines.append(f"# HELP {metric} {text}")
        lines.append(f"# TYPE {metric} {kind}")
        lines.append(f"{metric}{{{pairs}}} {value}" if pairs else f"{metric} {value}")
    return "\n".join(lines) + "\n"
