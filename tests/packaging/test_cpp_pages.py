# SPDX-License-Identifier: Apache-2.0
"""Every program of cpp/docs is built against the installed package, as its page says and with all
warnings as errors, and checks its own results."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import quire

DOCS = Path(__file__).resolve().parents[2] / "cpp/docs"
WARNINGS = "-Wall -Wextra -Werror"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text()
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no {language}"
    return found


def run(*command: object, **options) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, **options)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@pytest.mark.parametrize("number", range(3))
def test_cpp(number, tmp_path):
    programs, (cmake_lists,) = blocks("cpp.md", "cpp"), blocks("cpp.md", "cmake")
    assert len(programs) == 3
    (tmp_path / "CMakeLists.txt").write_text(cmake_lists)
    (tmp_path / "engine.cpp").write_text(programs[number])
    configure = ("cmake", "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "build")
    run(*configure, f"-Dquire_DIR={quire.get_cmake_dir()}", f"-DCMAKE_CXX_FLAGS={WARNINGS}")
    run("cmake", "--build", tmp_path / "build")
    assert run(tmp_path / "build/engine")


@pytest.mark.parametrize("number", range(3))
@pytest.mark.skipif(not shutil.which("pkg-config"), reason="needs pkg-config")
def test_c(number, tmp_path):
    programs = blocks("c.md", "c")
    assert len(programs) == 3
    (tmp_path / "engine.c").write_text(programs[number])
    export, command = re.findall(r"^    (.*)$", (DOCS / "c.md").read_text(), re.MULTILINE)[:2]
    assert export.startswith("export") and command.startswith("cc -std=c99 engine.c")
    script = f"{export}\n{command} {WARNINGS} -pedantic"
    run("bash", "-euc", script, cwd=tmp_path, env=os.environ | {"PYTHONSAFEPATH": "1"})
    assert run(tmp_path / "engine")
