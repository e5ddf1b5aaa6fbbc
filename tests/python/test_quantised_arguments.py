# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of quantised caches: refused before any work, by name."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import quire

BLOCKS, HEADS, DIM = 5, 2, 8
FLOAT8 = ml_dtypes.float8_e4m3fn


def cache(dtype=FLOAT8, shape=(BLOCKS, 16, HEADS, DIM)) -> np.ndarray:
    return np.zeros(shape, dtype)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


WRONG_SCALES = [
    (0.0, "expected a finite number > 0, got 0"),
    (-1.0, "expected a finite number > 0, got -1"),
    (float("nan"), "expected a finite number > 0, got nan"),
    (1e300, "expected a finite number > 0, got inf"),
    (10**400, "expected a finite number > 0"),
    (np.zeros(1, "f4"), "expected a finite number > 0, got 0"),
    (
        np.ones(3, "f4"),
        r"expected a number, [2] (num_kv_heads) or [5, 16, 2] (one a token and head)",
    ),
    (np.ones((5, 2), "f4"), "got [5, 2] float32"),
    (np.ones((5, 16, 1), "f4"), "got [5, 16, 1] float32"),
    (np.ones((4, 16, 2), "f4"), "got [4, 16, 2] float32"),
    (np.ones(2), "expected float32, float16"),
    (np.ones(2, "f2"), "expected float32, got [2] float16"),
]


@pytest.mark.parametrize(("scale", "expected"), WRONG_SCALES, ids=str)
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_wrong_scales(name, scale, expected):
    q = np.ones((2, 4, DIM), np.float32)
    table, seq_lens = np.array([[0, 1], [2, 3]], np.int32), np.array([20, 7], np.int32)
    out = np.full_like(q, 7)
    attn = quire.Attention(
        num_heads=4, num_kv_heads=HEADS, head_dim=DIM, dtype="float32", kv_dtype="float8_e4m3"
    )
    plan = attn.plan(table, seq_lens)
    for call in (
        lambda: quire.paged_attention(
            q, cache(), cache(), table, seq_lens, out=out, **{name: scale}
        ),
        lambda: attn.run(plan, q, cache(), cache(), out=out, **{name: scale}),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(f"paged_attention: {name}: ")
        assert expected in str(error.value)
    assert (out == 7).all()
    caches, k = (cache(), cache()), np.ones((3, HEADS, DIM), np.float32)
    with pytest.raises(ValueError) as error:
        quire.append_kv(k, k, *caches, np.arange(3), **{name: scale})
    assert str(error.value).startswith(f"append_kv: {name}: ") and expected in str(error.value)
    assert not any(x.astype(np.float32).any() for x in caches)


@pytest.mark.parametrize("scale", ["x", None, [1.0, 2.0]])
def test_no_scale_at_all(scale):
    k = np.ones((3, HEADS, DIM), np.float32)
    with pytest.raises(TypeError, match="append_kv: v_scale: expected"):
        quire.append_kv(k, k, cache(), cache(), np.arange(3), v_scale=scale)


@pytest.mark.parametrize(
    "scale", [0.25, np.float32(0.25), np.array(0.25, "f4"), np.full(1, 0.25, "f4")]
)
def test_a_number_may_come_in_many_forms(scale):
    caches, k = (cache(np.int8), cache(np.int8)), np.full((1, HEADS, DIM), 3, np.float32)
    quire.append_kv(k, k, *caches, np.array([4]), k_scale=scale, v_scale=1)
    assert (caches[0][0, 4] == 12).all() and (caches[1][0, 4] == 3).all()


def test_append_kv_refuses_and_writes_nothing():
    k = np.ones((3, HEADS, DIM), np.float32)
    per_token = np.zeros((BLOCKS, 16, HEADS), np.float32)
    broadcast = np.broadcast_to(np.float32(0), per_token.shape)
    for changes, expected in (
        ({"k": k.astype("i4")}, "k: expected float32, float16 or bfloat16, got"),
        ({"v": k.astype("f2")}, r"v: expected \[3, 2, 8\] float32, got \[3, 2, 8\] float16"),
        ({"v_cache": cache(np.int8)}, r"v_cache: expected \[5, 16, 2, head_dim\] float8_e4m3"),
        ({"v_scale": read_only(per_token.copy())}, "v_scale: expected writable memory"),
        ({"k_scale": per_token}, "v_scale: expected other memory than k_scale"),
        ({"v_scale": read_only(broadcast)}, "v_scale: expected writable"),
        ({"k_cache": np.zeros((5, 16, 2, 8), "u1")}, "k_cache: expected .* or int8, got .* uint8"),
    ):
        arguments = {"k": k, "v": k, "k_cache": cache(), "v_cache": cache(), **changes}
        arguments = {"v_scale": per_token, "slot_mapping": np.arange(3), **arguments}
        with pytest.raises(ValueError, match=f"append_kv: {expected}"):
            quire.append_kv(**arguments)
        assert not per_token.any() and not arguments["k_cache"].astype(np.float32).any()


def test_scales_of_caches_that_have_none():
    k, floats = np.ones((3, HEADS, DIM), np.float32), cache(np.float32)
    for scale in (0.5, np.ones(2, "f4"), np.ones((5, 16, 2), "f4")):
        with pytest.raises(
            ValueError, match="k_scale: expected .*, as float32 caches have no scale"
        ):
            quire.append_kv(k, k, floats, floats.copy(), np.arange(3), k_scale=scale)
    assert not floats.any()


def test_kv_dtype():
    for kv_dtype in ("float8_e4m3fn", "float32", "int4"):
        with pytest.raises(ValueError, match='kv_dtype: expected None, "bfloat16"'):
            quire.Attention(num_heads=4, num_kv_heads=2, head_dim=8, kv_dtype=kv_dtype)
    attn = quire.Attention(
        num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32", kv_dtype="int8"
    )
    plan = attn.plan(np.zeros((1, 1), np.int32), [3])
    q = np.ones((1, 4, 8), np.float32)
    with pytest.raises(ValueError, match=r"k_cache: expected .* int8, got .* float8_e4m3"):
        attn.run(plan, q, cache(), cache())


@pytest.mark.parametrize("dtype", ["float8_e4m3", "float8_e5m2", "int8"])
def test_kv_cache_holds_quantised_types(dtype):
    storage = quire.KVCache(2, 5, 16, 3, 8, dtype)
    assert storage.nbytes == 2 * 2 * 5 * 16 * 3 * 8
    assert storage.k(1).dtype == {"int8": np.int8, "float8_e4m3": FLOAT8}.get(
        dtype, ml_dtypes.float8_e5m2
    )
