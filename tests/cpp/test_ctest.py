# SPDX-License-Identifier: Apache-2.0
"""Builds and runs the C++ tests, so that one command runs everything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result.stdout


def test_cpp():
    """Needs CMake, Ninja and the system package doctest-dev."""
    run("cmake", "--preset", "dev")
    run("cmake", "--build", "--preset", "dev")
    assert "100% tests passed" in run("ctest", "--preset", "dev", "-j", str(os.cpu_count()))
