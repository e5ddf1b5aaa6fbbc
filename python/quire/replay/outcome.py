# SPDX-License-Identifier: Apache-2.0
"""The figures of one policy's run, as plain numbers for the table, the report and JSON."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .attention import AttentionLayer
from .engine import Replay


@dataclass(frozen=True)
class Outcome:
    """Shares and rates are fractions of 1; None where the figure has no meaning."""

    policy: str
    block_size: int  # tokens
    num_blocks: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    steps: int
    seconds: float
    filled_share: float  # of the slots of the blocks that sequences hold; mean over steps
    held_share: float  # of all blocks, by sequences; mean over steps
    max_running: int
    preemptions: int
    cached_tokens: int
    token_hit_rate: float | None
    found_ids: int
    countable_ids: int
    id_hit_rate: float | None
    tokens_per_second: float  # prompt (cached or not) and output
    bookkeeping_us_per_step: float
    attention_seconds: float | None
    decode_gb_per_second: float | None
    prefill_gflop_per_second: float | None
    leaked_blocks: int


def make_outcome(replay: Replay, layer: AttentionLayer | None) -> Outcome:
    """The outcome of a finished run."""
    policy = replay.policy
    used_blocks = replay.samples.column("used_blocks")
    used_tokens = replay.samples.column("used_tokens")
    return Outcome(
        policy=policy.name,
        block_size=policy.block_size,
        num_blocks=policy.num_blocks,
        requests=replay.done,
        prompt_tokens=replay.prompt_tokens,
        output_tokens=replay.output_tokens,
        steps=replay.steps,
        seconds=replay.seconds,
        filled_share=float(np.mean(used_tokens / (used_blocks * policy.block_size))),
        held_share=float(np.mean(used_blocks / policy.num_blocks)),
        max_running=replay.max_running,
        preemptions=replay.preemptions,
        cached_tokens=replay.cached_tokens,
        token_hit_rate=replay.hit_rate if policy.prefix_caching else None,
        found_ids=replay.found_ids,
        countable_ids=replay.countable_ids,
        id_hit_rate=_ratio(replay.found_ids, replay.countable_ids)
        if policy.prefix_caching
        else None,
        tokens_per_second=replay.tokens / replay.seconds,
        bookkeeping_us_per_step=1e6 * replay.bookkeeping_seconds / replay.steps,
        attention_seconds=layer.seconds if layer else None,
        decode_gb_per_second=_ratio(layer.decode_bytes / 1e9, layer.decode_seconds)
        if layer
        else None,
        prefill_gflop_per_second=_ratio(layer.prefill_flops / 1e9, layer.prefill_seconds)
        if layer
        else None,
        leaked_blocks=replay.leaked_blocks,
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
