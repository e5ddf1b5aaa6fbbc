# SPDX-License-Identifier: Apache-2.0
"""Rules of the tree that no compiler checks: who may include whom, file sizes, licence lines,
no dead files, nothing that belongs to somebody's machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = {".h", ".cpp", ".cu", ".cuh", ".py", ".def"}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
STANDARD = re.compile(
    r"^[a-z_0-9]+$|^(immintrin|cpuid|arm_neon|dirent|dlfcn|fcntl|pthread|sched|unistd|sys/.*"
    r"|stdint|stddef)\.h$"
)


def files() -> list[Path]:
    skip = {".git", "dist", "build", "__pycache__"}
    found = [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.is_file()
        and path.name != ".git"  # of a worktree: the place of the repository
        and not any(
            part in skip or part.startswith(("build-", ".venv", ".")) and part not in (".ci",)
            for part in path.relative_to(ROOT).parts[:-1]
        )
    ]
    assert len(found) > 50
    return found


def code_files(*folders: str) -> list[Path]:
    return [
        path
        for path in files()
        if path.suffix in CODE and str(path.relative_to(ROOT)).startswith(folders)
    ]


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_core_includes_only_itself_and_the_standard_library():
    for path in code_files("cpp/include", "cpp/src"):
        for name in includes(path):
            own = (path.parent / name).exists() or (ROOT / "cpp/src" / name).exists()
            public = (ROOT / "cpp/include" / name).exists()
            assert own or public or STANDARD.match(name), f"{relative(path)} includes {name}"


def test_public_headers_include_only_public_headers():
    for path in code_files("cpp/include"):
        for name in includes(path):
            assert name.startswith("quire/") or STANDARD.match(name), f"{relative(path)}: {name}"


def test_backends_know_no_sequences():
    forbidden = {
        f"quire/{x}.h"
        for x in ("block_allocator", "block_table", "prefix_cache", "kv_cache_manager", "scheduler")
    }
    for path in code_files("cpp/src/cpu", "cuda", "cpp/src/attention"):
        assert not forbidden & set(includes(path)), relative(path)


def test_the_runtime_knows_no_kernels():
    for path in code_files("cpp/src"):
        if "cpu/" in relative(path):
            continue
        assert not any(name.startswith("cpu/") for name in includes(path)), relative(path)


def test_kernel_params_are_plain_data():
    assert includes(ROOT / "cpp/include/quire/kernel_params.h") == ["cstdint"]


def test_python_api_stays_in_the_bindings():
    for path in code_files("cpp", "cuda", "tests/cpp"):
        names = includes(path)
        assert not any(n == "Python.h" or n.startswith("nanobind") for n in names), relative(path)


def test_no_framework_in_the_sources():
    for path in code_files("cpp", "cuda", "python"):
        for name in includes(path):
            if path.name.startswith("jax_") and name == "xla/ffi/api/ffi.h":
                continue  # quire._jax, a module of its own
            assert not re.match(r"(torch|ATen|c10|jaxlib|xla|numpy)/", name), relative(path)
        if path.suffix == ".py" and "integrations" not in relative(path):
            for line in path.read_text().splitlines():
                assert not re.match(r"\s*(import|from) (torch|jax)\b", line), relative(path)


def test_file_sizes():
    """About 150 lines, at most 400 with few exceptions, never over 700."""
    sizes = {
        relative(p): len(p.read_text().splitlines())
        for p in code_files("cpp", "cuda", "python", "tests")
    }
    long = {name: n for name, n in sizes.items() if n > 400 and not name.endswith("_core.pyi")}
    assert max(long.values(), default=0) <= 700, long
    assert len(long) <= 6, long
    median = sorted(sizes.values())[len(sizes) // 2]
    assert median <= 200, median


def test_root_cmake_is_short():
    assert len((ROOT / "CMakeLists.txt").read_text().splitlines()) <= 120


def test_licence_line_comes_first():
    for path in code_files("cpp", "cuda", "python", "tests"):
        first = path.read_text().split("\n", 1)[0]
        assert first.endswith("SPDX-License-Identifier: Apache-2.0"), relative(path)


def test_no_dead_sources():
    """Every C++ source is named in a build file, every header is included somewhere."""
    lists = "".join(
        p.read_text() for p in files() if p.name == "CMakeLists.txt" or p.suffix == ".cmake"
    )
    included = {
        Path(n).name for p in code_files("cpp", "cuda", "python", "tests") for n in includes(p)
    }
    for path in code_files("cpp/src", "cpp/include", "python/src", "tests/cpp"):
        if path.suffix == ".cpp":
            stem = path.stem.removeprefix("test_")
            assert path.name in lists or re.search(rf"\b{stem}\b", lists), relative(path)
        elif path.suffix == ".h":
            assert path.name in included, relative(path)


def test_nothing_of_a_machine_or_left_open():
    pattern = re.compile(
        r"/(root|home|work|farm)/|\bTODO\b|\bFIXME\b|\bXXX\b|pypi\.org|files\.pythonhosted"
    )
    for path in files():
        if path == Path(__file__) or path.suffix in (".png", ".gz"):
            continue
        match = pattern.search(path.read_text(errors="ignore"))
        assert not match, f"{relative(path)}: {match and match.group()}"


def test_no_large_or_generated_file_is_tracked():
    if not (ROOT / ".git").exists():
        return
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in tracked:
        assert not name.endswith((".so", ".whl", ".gz", ".pyc", ".o")), name
        assert (ROOT / name).stat().st_size < 300_000, name


@pytest.mark.parametrize("tool", ["ruff check", "ruff format --check", "clang-format"])
def test_formatters_agree(tool):
    command = tool.split()
    binary = shutil.which(command[0], path=str(Path(sys.executable).parent)) or shutil.which(
        command[0]
    )
    assert binary, f"{command[0]} is in the extra quire[test]"
    if command[0] == "clang-format":
        sources = [
            str(p)
            for p in code_files("cpp", "cuda", "python/src", "tests/cpp")
            if p.suffix != ".py"
        ]
        command = [binary, "--dry-run", "--Werror", *sources]
    else:
        command = [binary, *command[1:], "python", "tests"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[:3000]


def test_types():
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "python/quire"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout
