# SPDX-License-Identifier: Apache-2.0
"""A comparison in words and numbers: the lines above the table, its rows, the notes below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from math import isnan
from typing import Any

import numpy as np

import quire

from .outcome import Outcome
from .session import LIMITS, Comparison, Settings
from .synthetic import DESCRIPTION
from .trace import Trace


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


Row = tuple[str, Callable[[Outcome], str]]

_FILLED_ROW: Row = ("KV memory holding data [1]", lambda o: _percent(o.filled_share))
_HELD_ROW: Row = ("KV memory handed out [2]", lambda o: _percent(o.held_share))
_RUN_ROWS: list[Row] = [
    ("most sequences at once", lambda o: _number(o.max_running)),
    ("steps", lambda o: _number(o.steps)),
    ("preemptions", lambda o: _number(o.preemptions)),
    ("prompt tokens found cached", lambda o: _percent(o.token_hit_rate)),
]
_ID_ROW: Row = ("hash ids found cached [3]", lambda o: _percent(o.id_hit_rate))
_SPEED_ROWS: list[Row] = [
    ("seconds", lambda o: _number(o.seconds, 2)),
    ("tokens/s (prompt + output)", lambda o: _number(o.tokens_per_second)),
]
_ATTENTION_ROWS: list[Row] = [
    ("attention GB/s (decode steps)", lambda o: _number(o.decode_gb_per_second, 1)),
    ("attention GFLOP/s (prefill)", lambda o: _number(o.prefill_gflop_per_second)),
]
_LAST_ROWS: list[Row] = [
    ("schedule + commit, µs/step", lambda o: _number(o.bookkeeping_us_per_step, 1)),
    ("blocks leaked", lambda o: _number(o.leaked_blocks)),
]


def table_rows(comparison: Comparison) -> list[list[str]]:
    """The rows: a label, and a cell for each policy."""
    rows = [_FILLED_ROW]
    if comparison.settings.kv_bytes is not None:
        rows.append(_HELD_ROW)
    rows += _RUN_ROWS
    if comparison.trace.hash_block_size:
        rows.append(_ID_ROW)
    rows += _SPEED_ROWS
    if comparison.settings.attention:
        rows += _ATTENTION_ROWS
    rows += _LAST_ROWS
    return [[label, *(cell(outcome) for outcome in comparison.outcomes)] for label, cell in rows]


def ids_seen_before(trace: Trace) -> float:
    """Share of the trace's hash ids that an earlier request had: what no cache can beat."""
    ids = trace.hash_ids[: trace.hash_begin[-1]]
    return 1 - len(np.unique(ids)) / max(len(ids), 1)


def headline(trace: Trace, total: int, settings: Settings) -> list[str]:
    """What is replayed, on what; `total`: requests of the whole trace."""
    g = settings.geometry
    part = f"{len(trace):,} requests"
    if len(trace) < total:
        part = f"the first {len(trace):,} of {total:,} requests (--limit)"
    lines = [
        f"{trace.name}: {part}, {trace.input_lengths.sum():,} prompt and"
        f" {trace.output_lengths.sum():,} output tokens, longest {trace.max_length:,}"
    ]
    if trace.synthetic:
        lines.append(DESCRIPTION)
    if trace.hash_block_size:
        lines.append(
            f"hash ids stand for {trace.hash_block_size} tokens each;"
            f" {ids_seen_before(trace):.1%} of them were seen before"
        )
    else:
        lines.append("no hash ids: all tokens are unique to their request")
    lines.append(
        "saturated: all requests are queued at once in order of arrival, as fast as memory allows;"
        f" at most {LIMITS.max_seqs} sequences and {LIMITS.max_tokens_per_step} tokens a step"
    )
    memory = "unlimited" if settings.kv_bytes is None else f"{settings.kv_bytes / 2**20:,.1f} MiB"
    lines.append(
        f"KV memory {memory}, {g.bytes_per_token:,} bytes a token (one layer: {g.num_heads} heads,"
        f" {g.num_kv_heads} KV heads, head_dim {g.head_dim}, {g.dtype}),"
        f" blocks of {settings.block_size} tokens; "
        + ("attention is computed" if settings.attention else "bookkeeping alone, no attention")
    )
    return lines


def notes(comparison: Comparison) -> list[str]:
    """What the marked rows mean, and the verdict."""
    contiguous = comparison.outcomes[0]
    lines = [
        "contiguous: one reservation a sequence, as long as the longest request here"
        f" ({contiguous.block_size:,} tokens, room for {contiguous.num_blocks:,})",
        "[1] tokens stored / slots of the blocks that sequences hold, mean over steps",
    ]
    if comparison.settings.kv_bytes is not None:
        lines.append("[2] blocks that sequences hold / all blocks, mean over steps")
    if comparison.trace.hash_block_size:
        countable = comparison.outcomes[-1].countable_ids
        lines.append(
            f"[3] hash ids found whole at first admission; {countable:,} ids count: those with a"
            " token before the prompt's last one, which is always computed"
        )
    if comparison.settings.attention:
        lines.append(
            "attention (append_kv and plan included): GFLOP/s in steps with a prefill, GB/s of K"
            " and V read in the others"
        )
    if comparison.verdict:
        v = comparison.verdict
        lines.append(
            f"verify: {v.num_rows} random rows against float64:"
            f" {'passed' if v.passed else 'FAILED'}; the worst has error {v.error:.2e}, tolerance"
            f" {v.tolerance:.2e} ({v.policy}, request {v.request}, token {v.position})"
        )
    return lines


def to_json(comparison: Comparison, total: int, command: str) -> dict[str, Any]:
    """The whole comparison as JSON values; `total`: requests of the whole trace."""
    trace, settings, verdict = comparison.trace, comparison.settings, comparison.verdict
    return {
        "quire": quire.__version__,
        "command": command,
        "trace": {
            "name": trace.name,
            "synthetic": trace.synthetic,
            "requests": len(trace),
            "requests_in_file": total,
            "prompt_tokens": int(trace.input_lengths.sum()),
            "output_tokens": int(trace.output_lengths.sum()),
            "max_length": trace.max_length,
            "hash_block_size": trace.hash_block_size or None,
            "ids_seen_before": ids_seen_before(trace) if trace.hash_block_size else None,
        },
        "settings": asdict(settings) | asdict(LIMITS),
        "policies": [asdict(outcome) for outcome in comparison.outcomes],
        "verify": None
        if verdict is None
        else asdict(verdict)
        | {"passed": verdict.passed, "error": None if isnan(verdict.error) else verdict.error},
    }
