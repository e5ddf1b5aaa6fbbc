# SPDX-License-Identifier: Apache-2.0
"""Writes the stubs of python/quire anew from the installed modules."""

import importlib.util
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "python/quire"

if __name__ == "__main__":
    for module in ("_core", "_jax"):
        if importlib.util.find_spec(f"quire.{module}"):
            target = str(PACKAGE / f"{module}.pyi")
            stubgen = [sys.executable, "-m", "nanobind.stubgen", "-m", f"quire.{module}"]
            subprocess.run([*stubgen, "-o", target], check=True)
