# SPDX-License-Identifier: Apache-2.0
"""The numeric suite (tests/numeric) on a GPU, and on the emulated one that any machine has: the
package with another libquire_cuda.so beside the core, whose driver runs kernels on the emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import quire

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build-dev/tests/cuda/emulated/libquire_cuda.so"
HAS_GPU = any(row["device"] == "cuda" and row["available"] for row in quire.capabilities())


def run_suite(device: str, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests/numeric"), *arguments]
    environment = {**os.environ, "QUIRE_TEST_DEVICE": device, **environment}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def build(target: str) -> None:
    for command in (
        ["cmake", "--preset", "dev"],
        ["cmake", "--build", "--preset", "dev", "--target", target],
    ):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]


@pytest.fixture(scope="session")
def emulated_package(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH with the installed package and the emulated GPU."""
    build("quire_cuda_emulated")
    folder = tmp_path_factory.mktemp("emulated")
    installed = Path(quire._core.__file__).parent
    shutil.copytree(
        installed, folder / "quire", ignore=shutil.ignore_patterns("*.a", "include", "__pycache__")
    )
    shutil.copy(LIBRARY, folder / "quire/lib")
    return folder


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason=f"CUDA: {quire.cuda_state()}")
def test_on_the_gpu():
    run_suite("cuda")


def test_on_the_emulated_gpu(emulated_package):
    run_suite("emulator", PYTHONPATH=str(emulated_package))


def test_the_device_plans_for_c():
    build("test_c_device_plan")
    run = subprocess.run([LIBRARY.parent / "test_c_device_plan"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def test_the_emulated_gpu_is_described_like_one(emulated_package):
    code = (
        "import quire; print(quire.cuda_state()); a = quire.Attention(num_heads=8, num_kv_heads=2,"
        " head_dim=80, device='cuda'); print(a.explain()); print(quire.capabilities()[-1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(emulated_package)},
        capture_output=True,
        text=True,
    )
    assert "1 device: Fake GPU (sm_90)" in run.stdout, run.stderr
    assert "cuda.d64: head_dim 80: at most 64" in run.stdout
    assert "kFast): chosen" in run.stdout
    assert "'available': True" in run.stdout
