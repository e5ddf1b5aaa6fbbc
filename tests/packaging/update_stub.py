# SPDX-License-Identifier: Apache-2.0
"""Writes python/quire/_core.pyi anew from the installed module."""

import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parents[2] / "python/quire/_core.pyi"

if __name__ == "__main__":
    subprocess.run(
        [sys.executable, "-m", "nanobind.stubgen", "-m", "quire._core", "-o", str(TARGET)],
        check=True,
    )
