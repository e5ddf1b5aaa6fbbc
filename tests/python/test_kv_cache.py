# SPDX-License-Identifier: Apache-2.0
"""KVCache: storage, its views, and the example engine on top of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import quire

ENGINE = Path(__file__).resolve().parents[2] / "python/examples/tiny_engine.py"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_views_do_not_overlap_and_have_the_shape_of_a_cache(dtype):
    cache = quire.KVCache(2, 5, 16, 3, 8, dtype)
    views = [cache.k(0), cache.v(0), cache.k(1), cache.v(1)]
    for i, view in enumerate(views):
        assert view.shape == (5, 16, 3, 8) and not view.any()
        view[:] = i + 1
    assert all(np.all(view.astype(np.float32) == i + 1) for i, view in enumerate(views))
    assert cache.nbytes == sum(view.nbytes for view in views)
    assert views[0].dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def test_works_with_append_kv():
    cache = quire.KVCache(1, 4, 16, 2, 8, "float32")
    k = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
    quire.append_kv(k, -k, cache.k(0), cache.v(0), np.array([17, 3, 63], np.int64))
    assert np.array_equal(cache.k(0)[1, 1], k[0]) and np.array_equal(cache.v(0)[3, 15], -k[2])


def test_refusals():
    with pytest.raises(ValueError, match="num_blocks: expected at least 1, got 0"):
        quire.KVCache(1, 0, 16, 2, 8)
    with pytest.raises(ValueError, match='dtype: expected "float32"'):
        quire.KVCache(1, 1, 16, 2, 8, "int4")
    with pytest.raises(NotImplementedError, match="device"):
        quire.KVCache(1, 1, 16, 2, 8, device="cuda")


def test_the_example_engine_runs():
    run = subprocess.run([sys.executable, str(ENGINE)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
