# SPDX-License-Identifier: Apache-2.0
"""The machine's limits, measured by the library itself in the instruction set in use."""

from __future__ import annotations

from typing import Any

import numpy as np

from quire import _core

_READ_FLOATS = 64 << 20  # 256 MiB: more than any cache holds


class Roofs:
    """Rates on `quire.num_threads()` threads, in units a second: flop or bytes."""

    def __init__(self) -> None:
        """Touches the memory that is read once."""
        self._data: np.ndarray[Any, np.dtype[np.float32]] = np.ones(_READ_FLOATS, np.float32)

    def measure(self, roof: str) -> float:
        """One sample of "float32" or "bfloat16" (multiply-adds), or of "memory" (a read).

        "bfloat16" are pairs of bfloat16 where the CPU multiplies those, else float32.
        """
        if roof == "memory":
            return _core.read_rate(self._data)
        return _core.multiply_add_rate(roof == "bfloat16")
