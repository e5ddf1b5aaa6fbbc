# SPDX-License-Identifier: Apache-2.0
"""The suite's modules import each other by name, so that any backend can be put under them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from device import DEVICE  # noqa: E402

# What only the CPU backend has, and what is about its planner.
collect_ignore = (
    []
    if DEVICE == "cpu"
    else [
        "test_any_arguments.py",
        "test_backward.py",
        "test_large_caches.py",
        "test_shared_prefix.py",
    ]
)
