# SPDX-License-Identifier: Apache-2.0
"""Builds the module quire_probe (the bindings' tensor conversion alone) and imports it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).resolve().parent
BUILD = SOURCE.parents[2] / f"build-probe-{sys.implementation.cache_tag}"


def abi_headers() -> list[str]:
    """The folders of NumPy's and DLPack's own headers, where both packages are installed."""
    import numpy

    tvm_ffi = importlib.util.find_spec("tvm_ffi")
    if tvm_ffi is None or tvm_ffi.origin is None:
        return []
    return [numpy.get_include(), str(Path(tvm_ffi.origin).parent / "include")]


def load_probe() -> ModuleType:
    """Needs CMake, Ninja and nanobind; a second call of a day takes a second."""
    configure = [
        "cmake",
        *("-G", "Ninja", "-S", str(SOURCE), "-B", str(BUILD)),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DABI_HEADERS={';'.join(abi_headers())}",
    ]
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    path = next(BUILD.glob("quire_probe.*so"))
    spec = importlib.util.spec_from_file_location("quire_probe", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
