# SPDX-License-Identifier: Apache-2.0
"""The example that prefills in one process and decodes in another, over NIXL."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nixl_cu12")

EXAMPLE = Path(__file__).resolve().parents[2] / "python/examples/prefill_elsewhere.py"


def test_the_bits_are_those_of_one_process():
    run = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    num_bytes, num_pieces = re.search(r"(\d+) bytes of KV in (\d+) pieces", run.stdout).groups()
    assert int(num_bytes) == 2 * 2 * 44 * 16 * 2 * 32 * 4  # K and V, layers, blocks of 700 tokens
    assert int(num_pieces) > 2 * 5  # scattered: more than a run of blocks a layer
    tokens = re.search(r"same bits as in one process; tokens \[(.*)\]", run.stdout).group(1)
    assert len(tokens.split(",")) == 20 and len(set(tokens.split(","))) > 5
