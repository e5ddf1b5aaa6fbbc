# SPDX-License-Identifier: Apache-2.0
"""Attention: planned once and run often, with plans and tensors that do and do not fit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import quire

MODEL = dict(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32", block_size=4)
SEQ_LENS = np.array([9, 0, 700], np.int32)
CU_SEQLENS = np.array([0, 3, 3, 8], np.int32)


def random(*shape: int, dtype: object = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32).astype(dtype)


def block_table() -> np.ndarray:
    return np.random.default_rng(1).permutation(3 * 175).reshape(3, 175).astype(np.int32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "head_dim_v", "latent"),
    [(16, 1, 576, 512, True), (4, 2, 24, 8, True), (4, 2, 8, 24, False), (2, 2, 16, 1, False)],
)
def test_values_of_another_width(dtype, num_heads, num_kv_heads, head_dim, head_dim_v, latent):
    """Also over caches whose values are columns of their keys (MLA): the bits of one call."""
    k_cache = random(525, 4, num_kv_heads, head_dim, dtype=dtype)
    own_values = random(525, 4, num_kv_heads, head_dim_v, dtype=dtype)
    v_cache = k_cache[..., :head_dim_v] if latent else own_values
    q = random(8, num_heads, head_dim, dtype=dtype)
    batch = (block_table(), SEQ_LENS, CU_SEQLENS)
    attn = quire.Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=np.dtype(dtype).name,
        block_size=4,
        head_dim_v=head_dim_v,
    )
    out = attn.run(attn.plan(*batch), q, k_cache, v_cache)
    expected = quire.paged_attention(q, k_cache, v_cache, *batch[:2], cu_seqlens_q=batch[2])
    assert out.shape == (8, num_heads, head_dim_v) and out.dtype == dtype
    assert out.tobytes() == expected.tobytes()


def test_values_are_as_wide_as_keys_unless_told():
    q, cache = random(8, 4, 16), random(525, 4, 2, 16)
    batch = (block_table(), SEQ_LENS, CU_SEQLENS)
    narrow = quire.Attention(**MODEL, head_dim_v=8)
    for attn, width in (
        (quire.Attention(**MODEL), 16),
        (quire.Attention(**MODEL, head_dim_v=None), 16),
        (narrow, 8),
    ):
        assert attn.run(attn.plan(*batch), q, cache, cache[..., :width]).shape == (8, 4, width)
    with pytest.raises(ValueError, match=r"v_cache: expected .* 8\] float32, got .* 16\]"):
        narrow.run(narrow.plan(*batch), q, cache, cache)
    with pytest.raises(ValueError, match=r"out: expected \[8, 4, 8\] float32, got \[8, 4, 16\]"):
        narrow.run(narrow.plan(*batch), q, cache, cache[..., :8], np.empty_like(q))


@pytest.mark.parametrize("width", [0, -1])
def test_refuses_values_of_no_width(width):
    with pytest.raises(ValueError, match=rf"head_dim_v: expected .* at least 1, got {width}"):
        quire.Attention(**MODEL, head_dim_v=width)
