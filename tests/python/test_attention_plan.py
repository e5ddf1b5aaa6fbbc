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


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("num_heads", 2, 8),
        ("num_kv_heads", 4, 1),
        ("head_dim", 8, 16),
        ("head_dim_v", 8, 16),
        ("block_size", 8, 1),
        ("causal", False, True),
        ("window", (3, 0), (-1, 0)),
        ("dtype", "float16", "float32"),
        ("kv_dtype", "int8", "float32"),
    ],
)
def test_refuses_the_plan_of_another_model(name, theirs, ours):
    """It would address other heads, blocks or scratch memory than there are."""
    model = {**MODEL, "head_dim_v": 16, name: ours}
    plan = quire.Attention(**{**model, name: theirs}).plan(block_table(), SEQ_LENS, CU_SEQLENS)
    attn = quire.Attention(**model)
    q, out = random(8, model["num_heads"], 16), np.full((8, model["num_heads"], 16), 7, np.float32)
    cache = random(525, model["block_size"], model["num_kv_heads"], 16)
    with pytest.raises(ValueError, match=rf"plan: expected one made for {name}.*, got "):
        attn.run(plan, q, cache, cache, out)
    workspace = np.zeros(1 << 20, np.uint8)
    with pytest.raises(ValueError, match=rf"plan: expected one made for {name}.*, got "):
        attn.run_part(plan, 0, 1, q, cache, cache, out, workspace)
    assert (out == 7).all()


def test_takes_the_plan_of_a_model_that_scales_otherwise():
    """Layers that differ in scale and softcap alone share the step's plan."""
    q, cache = random(8, 4, 16), random(525, 4, 2, 16)
    batch = (block_table(), SEQ_LENS, CU_SEQLENS)
    other = quire.Attention(**MODEL, scale=0.5, softcap=3.0)
    plan = quire.Attention(**MODEL).plan(*batch)
    assert np.array_equal(
        other.run(plan, q, cache, cache), other.run(other.plan(*batch), q, cache, cache)
    )


@pytest.mark.parametrize("columns", [0, 1, 7])
def test_plans_a_batch_of_none(columns):
    """NumPy gives new arrays without elements strides of 0."""
    attn = quire.Attention(**MODEL)
    plan = attn.plan(np.zeros((0, columns), np.int32), np.zeros(0, np.int32))
    cache = random(3, 4, 2, 16)
    assert plan.num_work_items == 0
    assert attn.run(plan, np.zeros((0, 4, 16), np.float32), cache, cache).shape == (0, 4, 16)
