# SPDX-License-Identifier: Apache-2.0
"""A run's state over time, in bounded memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_MAX_SAMPLES = 2048


class Sample(NamedTuple):
    """The state in the middle of one step: slots are given, nothing has finished."""

    step: int
    seconds: float  # since the start
    used_tokens: int
    used_blocks: int  # held by sequences
    cached_blocks: int  # held by no sequence, but reusable
    running: int  # sequences
    waiting: int  # requests
    hit_rate: float  # of the prompt tokens so far


class Samples:
    """Samples at a uniform stride of steps, which doubles whenever they become too many."""

    def __init__(self) -> None:
        """Start with a stride of one step."""
        self._rows: list[Sample] = []
        self._stride = 1

    def add(self, sample: Sample) -> int:
        """Keeps a sample and returns the step to take the next one at."""
        self._rows.append(sample)
        if len(self._rows) == _MAX_SAMPLES:
            del self._rows[1::2]
            self._stride *= 2
        return self._rows[-1].step + self._stride

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._rows)

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """One field of all samples."""
        index = Sample._fields.index(name)
        return np.array([row[index] for row in self._rows], np.float64)
