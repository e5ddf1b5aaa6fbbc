# SPDX-License-Identifier: Apache-2.0
"""What an installed wheel must be able to do; build_wheels.py runs it where nothing else is."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import quire


def check_instruction_set() -> None:
    """A wheel that takes the scalar kernels on every machine would pass all else."""
    if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text().split()
        assert ("avx2" in flags) == ("avx2" in quire.supported_cpu_isas()), quire.cpu_isa()


def check_attention() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, heads, 16), np.float32) for heads in (4, 2, 2))
    k_all, v_all = (np.repeat(x[0], 2, axis=1) for x in (k, v))
    logits = np.einsum("qhd,khd->hqk", q[0], k_all) / 4
    logits = np.where(np.tril(np.ones((40, 40), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v_all)
    assert np.abs(quire.attention(q, k, v, causal=True)[0] - expected).max() < 1e-5
    low = (x.astype(ml_dtypes.bfloat16) for x in (q, k, v))
    out = quire.attention(*low, causal=True)
    assert np.abs(out[0].astype(np.float32) - expected).max() < 0.05


def check_errors() -> None:
    """Exceptions pass from libquire through the module, as what they are."""
    x = np.ones((1, 2, 1, 8), np.float32)
    large = np.ones((1, 2, 1, 4096), np.float32)
    for arguments, kind in (
        ((x, x, x[:, :1]), ValueError),
        ((x, None, x), TypeError),
        ((large, large, large), NotImplementedError),
    ):
        try:
            quire.attention(*arguments)
        except kind:
            continue
        raise AssertionError(f"expected {kind.__name__}")


def check_manager() -> None:
    manager = quire.KVCacheManager(num_blocks=8, block_size=4)
    seq = manager.create(np.arange(10, dtype=np.int32))
    assert manager.step([seq], [10]).slot_mapping.shape == (10,)
    manager.commit([seq], np.array([3], np.int32))
    manager.validate()


if __name__ == "__main__":
    check_instruction_set()
    check_attention()
    check_errors()
    check_manager()
    for folder in (quire.get_include(), quire.get_cmake_dir()):
        assert Path(folder).is_dir(), folder
    has_jax = importlib.util.find_spec("quire._jax") is not None
    if has_jax:
        from quire import _jax

        assert len(_jax.handlers()) == 6
    assert not {"torch", "jax"} & set(sys.modules)
    parts = [quire.__version__, quire.cpu_isa(), "with JAX" if has_jax else "without JAX"]
    print("works:", ", ".join(parts))
