# SPDX-License-Identifier: Apache-2.0
"""The backend reaches the driver through one table; what is not in it can't be called."""

from __future__ import annotations

import re
from pathlib import Path

HEADER = Path(__file__).resolve().parents[2] / "cuda/host/driver.h"
WAITS = re.compile(r"Synchronize|^cuMem(Free|cpy|set)(?!.*Async)|^cuStreamWait")


def test_no_function_of_the_driver_waits():
    functions = re.findall(r"F\(\w+, (cu\w+),", HEADER.read_text())
    assert {"cuLaunchKernel", "cuMemcpyHtoDAsync_v2"} <= set(functions)
    assert not [name for name in functions if WAITS.search(name)]
    assert all(WAITS.search(name) for name in ("cuCtxSynchronize", "cuMemcpyHtoD_v2", "cuMemFree"))
