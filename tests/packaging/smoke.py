# SPDX-License-Identifier: Apache-2.0
"""What an installed wheel must be able to do; build_wheels.py runs it where nothing else is, and
with `--jax` where JAX is, too."""

from __future__ import annotations

import functools
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


def make_problem() -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """q, k, v [1, 40, heads, 16] and their causal attention, float32."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, heads, 16), np.float32) for heads in (4, 2, 2))
    k_all, v_all = (np.repeat(x[0], 2, axis=1) for x in (k, v))
    logits = np.einsum("qhd,khd->hqk", q[0], k_all) / 4
    logits = np.where(np.tril(np.ones((40, 40), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v_all)
    return (q, k, v), out


def check_attention() -> None:
    arrays, expected = make_problem()
    tolerances = {np.float32: 1e-5, np.float16: 5e-3, ml_dtypes.bfloat16: 0.05}
    for dtype, tolerance in tolerances.items():
        out = quire.attention(*(x.astype(dtype) for x in arrays), causal=True)
        error = np.abs(out[0].astype(np.float32) - expected).max()
        assert out.dtype == dtype and error < tolerance, (dtype, error)


def check_caches() -> None:
    """Pages of each type that a cache can have, under float32 queries."""
    (q, k, v), expected = make_problem()
    scale = np.float32(max(np.abs(k).max(), np.abs(v).max()) / 127)
    tolerances = {
        np.float32: (1.0, 1e-5),
        ml_dtypes.float8_e4m3fn: (1.0, 0.2),
        ml_dtypes.float8_e5m2: (1.0, 0.4),
        np.int8: (scale, 0.05),
    }
    table, slots = np.arange(5, dtype=np.int32)[None], np.arange(40)
    rows = np.array([0, 40], np.int32)
    for dtype, (one, tolerance) in tolerances.items():
        pages = [np.zeros((5, 8, 2, 16), dtype) for _ in range(2)]
        quire.append_kv(k[0], v[0], *pages, slots, k_scale=one, v_scale=one)
        out = quire.paged_attention(
            q[0], *pages, table, rows[1:], cu_seqlens_q=rows, k_scale=one, v_scale=one
        )
        error = np.abs(out - expected).max()
        assert error < tolerance, (dtype, error)


def check_jax() -> None:
    """quire._jax is loaded by the XLA of jaxlib, whatever Python's version."""
    import jax

    arrays, expected = make_problem()
    out = jax.jit(functools.partial(quire.attention, causal=True))(*map(jax.numpy.asarray, arrays))
    assert np.abs(np.asarray(out)[0] - expected).max() < 1e-5


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
    check_caches()
    check_errors()
    check_manager()
    for folder in (quire.get_include(), quire.get_cmake_dir()):
        assert Path(folder).is_dir(), folder
    has_jax = importlib.util.find_spec("quire._jax") is not None
    if has_jax:
        from quire import _jax

        assert len(_jax.handlers()) == 6
    assert not {"torch", "jax"} & set(sys.modules)
    if sys.argv[1:] == ["--jax"]:
        check_jax()
    parts = [quire.__version__, quire.cpu_isa(), "with _jax" if has_jax else "without _jax"]
    parts += ["under jax.jit"] if "jax" in sys.modules else []
    print("works:", ", ".join(parts))
