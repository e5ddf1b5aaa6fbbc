# SPDX-License-Identifier: Apache-2.0
"""What is installed: contents of the wheel, import time, stubs, and the README's words."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import quire

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "cpp/include/quire"
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel named by QUIRE_WHEEL, or one that is built now."""
    if "QUIRE_WHEEL" in os.environ:
        return Path(os.environ["QUIRE_WHEEL"])
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("quire-*.whl"))


def test_wheel_holds_what_it_should(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        namelink = archive.read("quire/lib/libquire.so")
    assert any(re.fullmatch(r"quire/_core\.[\w.-]*so", name) for name in names), names
    for name in ("quire/__init__.py", "quire/_core.pyi", "quire/py.typed", "quire/cli.py"):
        assert name in names
    libraries = {name for name in names if "libquire." in name}
    assert libraries == {f"quire/lib/libquire.{kind}" for kind in ("so.0", "so", "a")}
    assert namelink == b"INPUT(libquire.so.0)\n"  # one copy, and no symlink
    headers = {name for name in names if name.endswith(".h")}
    assert headers == {f"quire/include/quire/{p.name}" for p in HEADERS.glob("*.h")}
    for name in ("cmake/quire/quire-config.cmake", "pkgconfig/quire.pc"):
        assert f"quire/lib/{name}" in names
    allowed = re.compile(r"quire/|quire-[\d.]+\.dist-info/")
    assert all(allowed.match(name) for name in names), names
    assert not any("test" in name or name.endswith((".cpp", ".c")) for name in names), names
    assert wheel.stat().st_size < 40 * 2**20
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;]*$", metadata, re.MULTILINE)
    assert required == ["numpy"], required
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    assert extras == {"cli", "torch", "jax", "transformers", "test"}


def test_import_takes_under_50_ms_over_numpy():
    """Of CPU time, for the machine may be busy; the best of seven fresh processes."""
    code = (
        "import numpy, time; start = time.process_time(); import quire;"
        "print(1e3 * (time.process_time() - start))"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(7)]
    assert min(float(run.stdout) for run in runs) < 50


def test_import_pulls_in_numpy_alone():
    code = (
        "import sys, numpy; before = set(sys.modules); import quire;"
        "print(*set(sys.modules) - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "jax",
        "rich",
        "typer",
        "matplotlib",
        "ml_dtypes",
        "quire.integrations",
        "quire.replay",
        "quire.cli",
    }
    assert not heavy & set(out.stdout.split())


@pytest.mark.parametrize("module", ["_core", "_jax"])
def test_stub_is_what_the_module_says(module, tmp_path):
    if importlib.util.find_spec(f"quire.{module}") is None:
        pytest.skip(f"quire was built without {module}")
    name = f"quire.{module}"
    command = [sys.executable, "-m", "nanobind.stubgen", "-m", name, "-O", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    generated = next(tmp_path.rglob("*.pyi")).read_text()
    committed = (ROOT / f"python/quire/{module}.pyi").read_text()
    assert generated.strip() == committed.strip(), "run tests/packaging/update_stub.py"


def test_everything_public_is_documented():
    for name in quire.__all__:
        item = getattr(quire, name)
        text = item.__doc__ or ""
        assert len(text) > 80 and "Example" in text or name == "AttentionPlan", name


def test_readme_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code, "the README has an example"
    assert len(code.group(1).splitlines()) <= 20
    subprocess.run([sys.executable, "-c", code.group(1)], check=True)


def test_readme_commands_are_the_ones_that_are_tested():
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert commands, "the README has two commands"
    first, second = (line for line in commands.group(1).splitlines() if line.strip())
    assert "pip install" in first and "quire replay" in first
    assert "pip install" in second and "pytest" in second
    assert "python -m pytest" in (ROOT / ".ci/run").read_text()


def test_version_is_one():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cmake = re.search(r"VERSION ([\d.]+) LANGUAGES", (ROOT / "CMakeLists.txt").read_text())
    assert version and cmake
    assert version.group(1) == cmake.group(1) == quire.__version__
    assert version.group(1) in (ROOT / "CHANGELOG.md").read_text()


def test_editable_install_is_possible():
    """scikit-build-core maps python/quire in place; the package folder must be where it says."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'wheel.packages = ["python/quire"]' in text
    assert (ROOT / "python/quire/__init__.py").exists()
