# SPDX-License-Identifier: Apache-2.0
"""The example that routes by prefix, on conversations in Mooncake's format."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")

EXAMPLE = Path(__file__).resolve().parents[2] / "python/examples/route_by_prefix.py"


def write_conversations(path: Path, count: int, turns: int) -> None:
    """Turns of `count` conversations in a random order; each adds 1024 tokens to the one before."""
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(count), turns))
    seen = np.zeros(count, int)
    with path.open("w") as lines:
        for number, conversation in enumerate(order.tolist()):
            seen[conversation] += 2
            blocks = [0, *(1 + 100 * conversation + i for i in range(seen[conversation]))]
            lines.write(
                json.dumps(
                    {
                        "timestamp": number,
                        "input_length": 512 * len(blocks),
                        "output_length": 1,
                        "hash_ids": blocks,  # block 0 is everybody's, as in the real trace
                    }
                )
                + "\n"
            )


def test_prefixes_are_found_where_they_are(tmp_path):
    trace = tmp_path / "conversations.jsonl"
    write_conversations(trace, count=40, turns=6)
    command = [sys.executable, str(EXAMPLE), str(trace), "--tokens", "400000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "240 requests, 4 replicas of 6250 blocks" in run.stdout
    rates = {
        name: float(rate) / 100
        for name, rate in re.findall(r"^(random|prefix) +hit rate +([\d.]+)%", run.stdout, re.M)
    }
    # One cache that holds all would find 5 of 6 turns but for their new tokens: 69 %.
    assert rates["prefix"] > 0.6 > rates["random"] + 0.1, run.stdout
