# SPDX-License-Identifier: Apache-2.0
"""Scatter lists of blocks: what they name, and blocks that go from one cache to another by them."""

from __future__ import annotations

import ctypes
import os

import ml_dtypes
import numpy as np
import pytest
import quire
import torch
from hypothesis import given
from hypothesis import strategies as st


def filled(num_blocks: int, first: int, layers: int = 2) -> quire.KVCache:
    cache = quire.KVCache(layers, num_blocks, 4, 2, 8, "float32")
    for i, pool in enumerate(cache.pools):
        pool[...] = np.arange(pool.size).reshape(pool.shape) + first + i * pool.size
    return cache


def move(pieces: np.ndarray) -> None:
    for source, destination, size in pieces.tolist():
        ctypes.memmove(destination, source, size)


def test_a_cache_lists_its_layers_one_after_the_other():
    cache = filled(8, 0)
    block = cache.nbytes // 2 // 8
    layers = [pool.ctypes.data for pool in cache.pools]
    expected = [(layer + at * block, n * block) for layer in layers for at, n in ((2, 3), (7, 1))]
    ranges = quire.export_blocks(cache.pools, [2, 3, 4, 7])
    assert ranges.dtype == np.int64 and ranges.tolist() == [list(row) for row in expected]
    assert np.array_equal(quire.import_blocks(cache.pools, np.int32([2, 3, 4, 7])), ranges)
    assert quire.export_blocks(cache.pools, []).shape == (0, 2)
    assert quire.export_blocks([], [3]).shape == (0, 2)


@given(st.integers(0, 6), st.randoms(use_true_random=False), st.booleans())
def test_blocks_arrive_and_nothing_else_changes(count, random, apart):
    """K and V of a layer as one pool, and each as a pool of its own, which is many pieces."""

    def pools(cache):
        return [f(i) for i in (0, 1) for f in (cache.k, cache.v)] if apart else cache.pools

    here, there = filled(7, 0), filled(9, 10_000)
    before = [pool.copy() for pool in there.pools]
    source, target = random.sample(range(7), count), random.sample(range(9), count)
    ranges = quire.export_blocks(pools(here), source)
    pieces = quire.pair_ranges(ranges, quire.import_blocks(pools(there), target))
    assert pieces.shape[1] == 3 and pieces[:, 2].sum() == here.nbytes // 7 * count
    move(pieces)
    for layer, old in enumerate(before):
        old[target] = here.pools[layer][source]
        assert np.array_equal(there.pools[layer], old)


def test_the_list_is_what_readv_and_writev_do():
    here, there = filled(7, 0), filled(7, 10_000)
    into, out = os.pipe()

    def buffers(ranges):
        return [(ctypes.c_char * size).from_address(at) for at, size in ranges.tolist()]

    sent = os.writev(out, buffers(quire.export_blocks(here.pools, [6, 1, 2])))
    assert sent == os.readv(into, buffers(quire.import_blocks(there.pools, [0, 5, 3])))
    os.close(into), os.close(out)
    for a, b in zip(here.pools, there.pools, strict=True):
        assert np.array_equal(a[[6, 1, 2]], b[[0, 5, 3]])


def test_pools_of_other_frameworks_dtypes_and_many_layers():
    tensors = [torch.zeros(4, 16, 2, 8, dtype=torch.bfloat16) for _ in range(80)]
    ranges = quire.import_blocks(tensors, [3, 1])
    assert len(ranges) == 160 and ranges[0, 0] == tensors[0][3].data_ptr()
    scales = np.zeros((4, 16, 2), np.float32)  # of a quantised cache, one a token and head
    elements = np.zeros((4, 16, 2, 8), ml_dtypes.float8_e4m3fn)
    assert quire.export_blocks([elements, scales], [2])[:, 1].tolist() == [256, 128]


@pytest.mark.parametrize("function", [quire.export_blocks, quire.import_blocks])
def test_refusals_name_the_argument(function):
    cache = filled(4, 0)
    pools, name = cache.pools, function.__name__
    for blocks, where in (([0, 4], 1), ([-1], 0)):
        expected = rf"{name}: blocks\[{where}\]: expected a block id in \[0, 4\) of pools\[0\]"
        with pytest.raises(ValueError, match=f"{expected}, got {blocks[where]}"):
            function(pools, blocks)
    with pytest.raises(ValueError, match=rf"{name}: blocks: expected a one-dimensional int32"):
        function(pools, np.array([0]))
    with pytest.raises(TypeError, match=rf"{name}: blocks: expected an int32 array or a list"):
        function(pools, ["0"])
    with pytest.raises(ValueError, match=rf"{name}: pools\[1\]: expected \[num_blocks, ...\]"):
        function([pools[0], np.zeros(4, np.float32)], [0])
    with pytest.raises(ValueError, match=rf"{name}: pools\[0\]: expected a contiguous last"):
        function([pools[0][..., ::2]], [0])
    with pytest.raises(TypeError, match=rf"{name}: pools\[0\]"):
        function([3], [0])


def test_what_is_written_is_written_once():
    pools = filled(4, 0).pools
    assert len(quire.export_blocks(pools, [1, 1])) == 4
    with pytest.raises(ValueError, match="blocks: expected each block once, got 1 twice"):
        quire.import_blocks(pools, [1, 0, 1])
    with pytest.raises(ValueError, match="pools: expected each byte once, got memory that overl"):
        quire.import_blocks([pools[0], pools[0]], [1])
    pools[0].flags.writeable = False
    assert len(quire.export_blocks(pools, [1])) == 2
    with pytest.raises(ValueError, match=r"pools\[0\]: expected writable"):
        quire.import_blocks(pools, [1])


def test_pair_ranges_refuses():
    ranges = np.array([[4096, 64]])
    with pytest.raises(ValueError, match="destinations: expected 64 bytes.* got 0"):
        quire.pair_ranges(ranges, ranges[:0])
    with pytest.raises(ValueError, match=r"sources\[0\]: expected 0 bytes or more, got -64"):
        quire.pair_ranges(ranges * [1, -1], ranges)
    with pytest.raises(ValueError, match=r"sources: expected \[n, 2\] int64"):
        quire.pair_ranges(ranges.astype(np.int32), ranges)
    assert quire.pair_ranges(ranges * [1, 0], ranges[:0]).shape == (0, 3)
