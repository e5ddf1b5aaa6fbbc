# SPDX-License-Identifier: Apache-2.0
"""Every Python block of python/README.md and of the pages for each framework runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "python/README.md").read_text()
SECTIONS = re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
NEEDED = {"jax": ["jax", "quire._jax"]}


def program(page: str) -> str:
    """All Python blocks of a page, each line where it is in the page."""
    lines, language = [], None
    for line in page.splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
            line = ""
        lines.append(line if language == "python" else "")
    return "\n".join(lines)


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_each_section_has_its_example_and_each_page_its_blocks():
    titles = [title for title, _ in SECTIONS]
    assert titles == [
        "Layers that differ",
        "Beyond the pool",
        "Any other framework",
        "Several processes",
    ]
    assert README.count("```python") == len(SECTIONS)
    for name in ("numpy", "torch", "jax", "transformers"):
        assert program((ROOT / f"python/docs/{name}.md").read_text()).count("assert ") >= 4


@pytest.mark.parametrize(("title", "code"), SECTIONS)
def test_section(title, code):
    run(code)


@pytest.mark.parametrize("page", sorted((ROOT / "python/docs").glob("*.md")), ids=lambda p: p.stem)
def test_page(page):
    needed = NEEDED.get(page.stem, [])
    if any(importlib.util.find_spec(module) is None for module in needed):
        pytest.skip(f"needs {needed}")
    run(program(page.read_text()))


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("python/**/*.md"), *ROOT.glob("c*/**/*.md")]
)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https:") or (page.parent / target).exists(), target
