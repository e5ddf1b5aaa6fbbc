# SPDX-License-Identifier: Apache-2.0
"""Gates on what nvcc makes of the kernels, for every architecture. Needs the compiler and
cuobjdump; both come as packages, too: nvidia-cuda-nvcc, -crt, -runtime, -cccl and nvidia-nvvm,
nvidia-cuda-cuobjdump and -nvdisasm. QUIRE_CUDA_KERNELS=minimal compiles those of head dim 128 only,
a third of the time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = os.environ.get("QUIRE_CUDA_KERNELS", "full")
PACKAGED = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu1*/bin"))
PATH = os.pathsep.join([os.environ["PATH"], *map(str, PACKAGED)])
MISSING = [tool for tool in ("nvcc", "cuobjdump", "nvdisasm") if not shutil.which(tool, path=PATH)]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def run(*command: str) -> str:
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": PATH}, capture_output=True, text=True
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return result.stdout


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """All kernels for all architectures, and PTX of some."""
    run("cmake", "--preset", "cuda", f"-DQUIRE_CUDA_KERNELS={KERNELS}")
    run("cmake", "--build", "--preset", "cuda", "--target", "quire_cuda", "test_ptx")


def test_every_kernel_is_what_it_should_be():
    assert "kernels pass" in run(sys.executable, "tests/cuda/gates.py", "build-cuda/cuda")


def test_some_kernels_run_as_nvcc_left_them():
    assert "100% tests passed" in run("ctest", "--preset", "cuda", "-R", "emulator_ptx")


def test_the_library_fits_the_wheel():
    size = (ROOT / "build-cuda/cpp/libquire_cuda.so").stat().st_size
    assert size < 25 * 2**20
