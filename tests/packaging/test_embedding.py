# SPDX-License-Identifier: Apache-2.0
"""Engines in C and C++: the examples are built and run against an installed prefix and against the
installed Python package, with all warnings as errors."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import quire

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "cpp/examples"
PACKAGE_LIB = Path(quire.get_cmake_dir()).parents[1]
WARNINGS = "-Wall -Wextra -Werror"


def run(*command: object, **options) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, **options)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """The CMake package of a prefix, filled from the build folder that test_cpp() uses."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--preset", "dev", "-DCMAKE_INSTALL_LIBDIR=lib")
    run("cmake", "--build", "--preset", "dev", "--target", "quire", "quire_static")
    run("cmake", "--install", "build-dev", "--prefix", prefix)
    return prefix / "lib/cmake/quire"


@pytest.fixture
def cmake_dir(where, request) -> Path:
    """The CMake package of a prefix, or of the Python package."""
    return request.getfixturevalue("prefix") if where == "prefix" else Path(quire.get_cmake_dir())


@pytest.mark.parametrize("where", ["prefix", "package"])
@pytest.mark.parametrize("link", ["shared", "static"])
@pytest.mark.parametrize("example", ["embed_cmake", "embed_c"])
def test_example(example, link, cmake_dir, tmp_path):
    flags = {"embed_cmake": [f"-DCMAKE_CXX_FLAGS={WARNINGS}"]}.get(
        example, [f"-DCMAKE_C_FLAGS={WARNINGS} -pedantic"]
    )
    static = "ON" if link == "static" else "OFF"
    configure = ("cmake", "-G", "Ninja", "-S", EXAMPLES / example, "-B", tmp_path, *flags)
    run(*configure, f"-Dquire_DIR={cmake_dir}", f"-DEMBED_STATIC={static}")
    commands = run("cmake", "--build", tmp_path, "--verbose")
    assert all(flag in commands for flag in WARNINGS.split())
    assert example != "embed_c" or ("-std=c99" in commands and "-pedantic" in commands)
    assert ("libquire.a" in commands) == (link == "static")
    assert run(tmp_path / "engine").endswith("ok\n")


@pytest.mark.parametrize("where", ["prefix", "package"])
@pytest.mark.skipif(not shutil.which("pkg-config"), reason="needs pkg-config")
def test_pkg_config(cmake_dir, tmp_path):
    lib = cmake_dir.parents[1]
    environment = os.environ | {"PKG_CONFIG_PATH": str(lib / "pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "quire", env=environment).split()
    engine = tmp_path / "engine"
    source = EXAMPLES / "embed_c/engine.c"
    strict = (*WARNINGS.split(), "-std=c99", "-pedantic")
    run("cc", *strict, source, "-o", engine, *flags, "-lm", f"-Wl,-rpath,{lib}")
    assert run(engine).endswith("ok\n")
    version = run("pkg-config", "--modversion", "quire", env=environment).strip()
    assert version == quire.__version__


def test_the_c_interface_is_exported_whole():
    folder = Path(quire.get_include()) / "quire"
    header = "".join((folder / name).read_text() for name in ("quire.h", "quire_kv.h"))
    names = re.findall(
        r"^(?:QuireStatus|QuireTensor|void|const char\*) (quire_\w+)\(", header, re.M
    )
    assert len(names) > 90
    library = ctypes.CDLL(str(PACKAGE_LIB / "libquire.so.0"))
    assert all(hasattr(library, name) for name in names)
    library.quire_version.restype = ctypes.c_char_p
    assert library.quire_version().decode() == quire.__version__


def test_cmakedir_is_printed_without_the_packages_of_the_cli():
    code = (
        "import runpy, sys; sys.modules.update(typer=None, rich=None);"
        "sys.argv = ['quire', '--cmakedir']; runpy.run_module('quire', run_name='__main__')"
    )
    assert run(sys.executable, "-c", code).strip() == quire.get_cmake_dir()
    assert (Path(quire.get_cmake_dir()) / "quire-config.cmake").exists()
