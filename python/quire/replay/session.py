# SPDX-License-Identifier: Apache-2.0
"""A whole comparison: what to replay, the three policies one after the other, the check of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .attention import AttentionLayer, TokenTables
from .engine import Limits, Replay
from .outcome import Outcome, make_outcome
from .policies import Geometry, Policy, default_kv_bytes
from .samples import Samples
from .tokens import TokenSource
from .trace import InputError, Trace
from .verify import Verdict, Verifier

LIMITS = Limits(max_tokens_per_step=2048, max_seqs=256)

# What bounds the default number of requests: the time of a policy at these modest speeds.
_DEFAULT_SECONDS = 6
_PREFILL_FLOPS = 300e9  # a second
_DECODE_BYTES = 15e9


@dataclass(frozen=True)
class Settings:
    """The options of a replay."""

    geometry: Geometry
    block_size: int
    kv_bytes: int | None  # None: unlimited
    attention: bool
    verify_rows: int
    seed: int


@dataclass(frozen=True)
class Comparison:
    """All that a replay found out."""

    trace: Trace
    settings: Settings
    outcomes: list[Outcome]
    samples: list[Samples]  # of each policy
    verdict: Verdict | None


class Progress(Protocol):
    """Shows a run while it goes on."""

    def start(self, replay: Replay) -> None:
        """A policy begins."""

    def update(self, replay: Replay) -> None:
        """It goes on, about ten times a second."""

    def finish(self, replay: Replay) -> None:
        """It is done."""


def affordable_requests(trace: Trace, geometry: Geometry) -> int:
    """How many requests to replay with attention if nobody says: what takes some 6 s a policy."""
    inputs, outputs = (x.astype(float) for x in (trace.input_lengths, trace.output_lengths))
    pairs = inputs * (inputs + 1) / 2
    flops = 4 * geometry.num_heads * geometry.head_dim * pairs
    num_bytes = geometry.bytes_per_token * outputs * (inputs + outputs / 2)
    seconds = np.cumsum(flops / _PREFILL_FLOPS + num_bytes / _DECODE_BYTES)
    return max(int(np.searchsorted(seconds, _DEFAULT_SECONDS)), 1)


def compare(
    trace: Trace, policies: list[Policy], settings: Settings, progress: Progress
) -> Comparison:
    """Replays the trace under each policy, and checks rows of all."""
    source = TokenSource(trace)
    layer = tables = verifier = None
    if settings.attention:
        tables = TokenTables(settings.geometry, settings.seed)
        num_slots = max(policy.num_slots for policy in policies)
        layer = AttentionLayer(settings.geometry, num_slots, LIMITS.max_tokens_per_step, tables)
        if settings.verify_rows:
            verifier = Verifier(settings.verify_rows, settings.seed)
    outcomes, samples = [], []
    for policy in policies:
        replay = Replay(trace, policy, LIMITS, source)
        if layer is not None:
            layer.start(policy, verifier)
        progress.start(replay)
        replay.run(layer, progress.update)
        progress.finish(replay)
        outcomes.append(make_outcome(replay, layer))
        samples.append(replay.samples)
    verdict = verifier.check(source, tables) if verifier and tables else None
    return Comparison(trace, settings, outcomes, samples, verdict)


def resolve_kv_bytes(
    text: str | None, trace: Trace, geometry: Geometry, attention: bool
) -> int | None:
    """The budget that --kv-memory means for this trace; None: unlimited."""
    if text is None:
        return default_kv_bytes(trace, geometry)
    if text == "unlimited":
        if attention:
            raise InputError(
                "--kv-memory: expected a size, as attention is computed, got unlimited"
            )
        return None
    units = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9}
    number = text.rstrip("KMGiB")
    try:
        size = float(number) * units[text[len(number) :]]
        return int(size)
    except (KeyError, ValueError, OverflowError) as error:
        raise InputError(
            f"--kv-memory: expected a size as 512MiB or 2GB, or unlimited, got {text}"
        ) from error
