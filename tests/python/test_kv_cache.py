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


@pytest.mark.parametrize("count", ["4", 4.0, None])
def test_counts_are_integers(count):
    with pytest.raises(TypeError, match="num_blocks: expected an integer, got"):
        quire.KVCache(1, count, 16, 2, 8)


def test_no_block_is_not_the_last_one():
    """-1 is what block tables hold where there is no block."""
    cache = quire.KVCache(2, 3, 4, 2, 8, "float32")
    cache.k(0)[:] = 1
    payload, before = cache.read_block(0), cache.k(0).copy()
    for block in (-1, 3):
        with pytest.raises(IndexError, match=rf"block: expected a block in \[0, 3\), got {block}"):
            cache.read_block(block)
        with pytest.raises(IndexError, match=rf"block: expected a block in \[0, 3\), got {block}"):
            cache.write_block(block, payload * 0)
        for pair in ((0, block), (block, 0)):
            with pytest.raises(
                IndexError, match=r"copy_from: src_dst\[:, [01]\]: expected a block"
            ):
                cache.copy_from(cache.like(3), np.array([[1, 1], pair], np.int32))
    assert np.array_equal(cache.k(0), before)
    cache.copy_from(cache.like(1), np.empty((0, 2), np.int32))


def test_copies_only_between_caches_of_one_kind():
    """NumPy would repeat the one head and round the floats."""
    cache = quire.KVCache(2, 3, 4, 2, 8, "float32")
    pair = np.array([[0, 0]], np.int32)
    for other in (quire.KVCache(2, 3, 4, 1, 8, "float32"), quire.KVCache(2, 3, 4, 2, 8, "float16")):
        with pytest.raises(ValueError, match="copy_from: source: expected"):
            cache.copy_from(other, pair)
    with pytest.raises(ValueError, match=r"src_dst: expected \[n, 2\], got \(2,\)"):
        cache.copy_from(cache.like(5), pair[0])


def test_the_example_engine_runs():
    run = subprocess.run([sys.executable, str(ENGINE)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
