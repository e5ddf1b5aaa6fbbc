# SPDX-License-Identifier: Apache-2.0
"""Every example of python/README.md runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "python/README.md").read_text()
EXAMPLES = re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_each_framework_has_an_example():
    titles = [title for title, _ in EXAMPLES]
    assert titles == [
        "NumPy",
        "torch",
        "JAX",
        "transformers",
        "Beyond the pool",
        "Any other framework",
    ]


@pytest.mark.parametrize(("title", "code"), EXAMPLES)
def test_example(title, code):
    needed = {"JAX": ["jax", "quire._jax"]}.get(title, [])
    if any(importlib.util.find_spec(module) is None for module in needed):
        pytest.skip(f"needs {needed}")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
