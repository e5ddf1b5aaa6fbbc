# SPDX-License-Identifier: Apache-2.0
"""The cache operations against NumPy, over poisoned and strided caches."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, Case, Problem, poisoned_caches
from device import DEVICE, quire
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Options, attend
from tolerance import check_lse, check_out


def as_bits(array: np.ndarray) -> np.ndarray:
    """Compares NaN with NaN."""
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", ["nhd", "hnd", "pool"])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (1, 7), (5, 128), (300, 40)])
def test_append_kv_writes_its_slots_and_nothing_else(dtype, cache, block_size, head_dim):
    case = Case(
        dtype=dtype, cache=cache, block_size=block_size, head_dim=head_dim, head_dim_v=head_dim
    )
    rng = np.random.default_rng(1)
    num_blocks = 9
    k_cache, v_cache = poisoned_caches(case, num_blocks)
    slots = rng.permutation(num_blocks * block_size)[:6].astype(np.int64)
    slots[2] = -1
    k, v = (rng.standard_normal((6, 2, head_dim), np.float32).astype(DTYPES[dtype]) for _ in "kv")
    expected = [np.array(k_cache), np.array(v_cache)]
    for t, slot in enumerate(slots):
        if slot >= 0:
            expected[0][slot // block_size, slot % block_size] = k[t]
            expected[1][slot // block_size, slot % block_size] = v[t]
    quire.append_kv(k, v, k_cache, v_cache, slots)
    assert np.array_equal(as_bits(np.array(k_cache)), as_bits(expected[0]))
    assert np.array_equal(as_bits(np.array(v_cache)), as_bits(expected[1]))


def make_rope(rng, num_tokens: int, rotary_dim: int, interleaved: bool) -> quire.Rope:
    """Positions in no order, some twice; rows that no token is at are NaN, as is what lies
    between rows."""
    angles = np.outer(np.arange(900), 10000.0 ** -(np.arange(0, rotary_dim, 2) / rotary_dim))
    table = np.full((900, rotary_dim + 3), np.nan, np.float32)
    cos_sin = table[:, 1 : rotary_dim + 1]
    positions = rng.choice(900, num_tokens).astype(np.int32)
    positions[-1] = positions[0]
    cos_sin[positions] = np.hstack([np.cos(angles), np.sin(angles)])[positions]
    return quire.Rope(cos_sin, positions, interleaved)


def rotated(x: np.ndarray, rope: quire.Rope) -> tuple[np.ndarray, np.ndarray]:
    """x turned in float64, and the largest error of a float32 computation that is rounded once."""
    rotary_dim = rope.cos_sin.shape[1]
    rows = rope.cos_sin[rope.positions].astype(np.float64)[:, None]
    cos, sin = rows[..., : rotary_dim // 2], rows[..., rotary_dim // 2 :]
    if rope.interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    else:
        first, second = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
    exact = x.astype(np.float64)
    a, b = exact[..., first].copy(), exact[..., second].copy()
    exact[..., first], exact[..., second] = a * cos - b * sin, b * cos + a * sin
    bound = np.zeros_like(exact)
    bound[..., first] = bound[..., second] = (abs(a) + abs(b)) * 2.0**-22
    info = ml_dtypes.finfo(x.dtype)
    bound[..., :rotary_dim] += abs(exact[..., :rotary_dim]) * float(info.eps) / 2
    bound[..., :rotary_dim] += float(info.smallest_subnormal)
    return exact, bound


def check_rotated(out: np.ndarray, x: np.ndarray, rope: quire.Rope) -> None:
    exact, bound = rotated(x, rope)
    assert (abs(out.astype(np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", ["nhd", "hnd", "pool"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("block_size", "head_dim", "rotary_dim"),
    [(16, 64, 64), (1, 7, 6), (5, 128, 32), (16, 300, 300), (3, 96, 2)],
)
def test_append_kv_rotates_keys(dtype, cache, interleaved, block_size, head_dim, rotary_dim):
    case = Case(
        dtype=dtype, cache=cache, block_size=block_size, head_dim=head_dim, head_dim_v=head_dim
    )
    rng = np.random.default_rng(3)
    k_cache, v_cache = poisoned_caches(case, 40)
    slots = rng.permutation(40 * block_size)[:23].astype(np.int64)
    slots[[2, 9]] = -1
    shape = (23, 2, head_dim)
    k, v = (rng.standard_normal(shape, np.float32).astype(DTYPES[dtype]) for _ in "kv")
    k[slots < 0] = np.nan
    rope = make_rope(rng, 23, rotary_dim, interleaved)
    quire.append_kv(k, v, k_cache, v_cache, slots, rope=rope)
    written = slots >= 0
    where = slots[written] // block_size, slots[written] % block_size
    tokens = quire.Rope(rope.cos_sin, rope.positions[written], interleaved)
    check_rotated(k_cache[where], k[written], tokens)
    assert np.array_equal(as_bits(v_cache[where]), as_bits(v[written]))
    for written_cache in (np.array(k_cache), np.array(v_cache)):
        written_cache[where] = np.nan
        assert np.isnan(written_cache.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 32), (11, 6), (300, 280)])
def test_apply_rope_turns_queries_as_append_kv_turns_keys(dtype, interleaved, head_dim, rotary_dim):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((300, 6, head_dim), np.float32).astype(DTYPES[dtype])
    q = x[:, 1:5]  # heads of a projection that holds q, k and v
    before = x.copy()
    rope = make_rope(rng, 300, rotary_dim, interleaved)
    out = quire.apply_rope(q, rope)
    assert np.array_equal(as_bits(x), as_bits(before))
    check_rotated(out, q, rope)
    cache = np.empty((300, 1, 4, head_dim), q.dtype)
    quire.append_kv(q, q, cache, cache.copy(), np.arange(300), rope=rope)
    assert np.array_equal(as_bits(cache[:, 0]), as_bits(out))
    assert quire.apply_rope(q, rope, out=q) is q
    assert np.array_equal(as_bits(np.ascontiguousarray(q)), as_bits(out))
    assert np.array_equal(as_bits(x[:, [0, 5]]), as_bits(before[:, [0, 5]]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_swap_blocks_between_pools_of_any_layout(data):
    src_blocks, dst_blocks = (data.draw(st.integers(0, 12)) for _ in range(2))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    src, dst = (
        poisoned_caches(
            Case(
                dtype=dtype,
                block_size=5,
                head_dim=7,
                head_dim_v=7,
                cache=data.draw(st.sampled_from(("nhd", "hnd", "pool"))),
            ),
            num_blocks,
        )[0]
        for num_blocks in (src_blocks, dst_blocks)
    )
    src[:] = np.random.default_rng(5).standard_normal(src.shape, np.float32).astype(src.dtype)
    n = data.draw(st.integers(0, dst_blocks)) if src_blocks else 0
    destinations = data.draw(st.permutations(range(dst_blocks)))[:n]
    sources = [data.draw(st.integers(0, src_blocks - 1)) for _ in range(n)]
    expected = np.array(dst)
    expected[destinations] = src[sources]
    pairs = np.array(list(zip(sources, destinations, strict=True)), np.int32).reshape(-1, 2)
    src.flags.writeable = False
    quire.swap_blocks(src, dst, pairs)
    assert np.array_equal(as_bits(np.array(dst)), as_bits(expected))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_copy_blocks(data):
    num_blocks = data.draw(st.integers(2, 12))
    order = data.draw(st.permutations(range(num_blocks)))
    n = data.draw(st.integers(0, num_blocks // 2))
    destinations = order[:n]
    sources = [data.draw(st.sampled_from(order[n:])) for _ in range(n)]
    cache = data.draw(st.sampled_from(("nhd", "hnd", "pool")))
    k_cache, v_cache = poisoned_caches(Case(cache=cache, head_dim=8, head_dim_v=8), num_blocks)
    k_cache[:] = np.arange(num_blocks)[:, None, None, None]
    expected = [np.array(k_cache), np.array(v_cache)]
    for array in expected:
        array[destinations] = array[sources]
    pairs = np.array(list(zip(sources, destinations, strict=True)), np.int32).reshape(-1, 2)
    quire.copy_blocks(k_cache, v_cache, pairs)
    assert np.array_equal(as_bits(np.array(k_cache)), as_bits(expected[0]))
    assert np.array_equal(as_bits(np.array(v_cache)), as_bits(expected[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [(0, 50), (0, 20, 50), (0, 1, 17, 33, 50), (0, 0, 50, 50)])
def test_merge_states_joins_disjoint_keys(dtype, cuts):
    problem = Problem.make(Case(dtype=dtype, batch=((6, 50),), causal=False))
    q, k, v = problem.qs[0], problem.ks[0], problem.vs[0]
    parts = [
        quire.attention(q[None], k[None, a:b], v[None, a:b], return_lse=True)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    out, lse = quire.merge_states([out[0] for out, _ in parts], [lse[0] for _, lse in parts])
    exact_out, exact_lse = attend(q, k, v, Options())
    check_out(out, exact_out, problem.naive()[0], factor=3.0)
    check_lse(lse, exact_lse, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_states_ignores_what_empty_states_hold(dtype):
    rng = np.random.default_rng(2)
    outs = rng.standard_normal((3, 4, 2, 24), np.float32).astype(DTYPES[dtype])
    lses = rng.standard_normal((3, 2, 4), np.float32)
    lses[1] = -np.inf
    outs[1] = np.nan
    lses[:, 0, 2] = -np.inf  # row 2 of head 0 has no state at all
    out, lse = quire.merge_states(outs, lses)
    kept_out, kept_lse = quire.merge_states(outs[[0, 2]], lses[[0, 2]])
    assert np.array_equal(as_bits(out), as_bits(kept_out))
    assert np.array_equal(as_bits(lse), as_bits(kept_lse))
    assert np.all(out[2, 0].astype(np.float32) == 0) and np.isneginf(lse[0, 2])
    assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="is about the CPU")
@pytest.mark.parametrize("states", [1, 3])
def test_merge_states_keeps_nan(states):
    """One state that went wrong is not the same as none."""
    outs, lses = np.ones((states, 2, 1, 4), np.float32), np.zeros((states, 1, 2), np.float32)
    outs[0, 1], lses[0, 0, 1] = np.nan, np.nan
    out, lse = quire.merge_states(outs, lses)
    assert np.isnan(out[1]).all() and np.isnan(lse[0, 1])
    assert (out[0] == 1).all() and np.isclose(lse[0, 0], np.log(states))


@pytest.mark.skipif(DEVICE != "cpu", reason="is about lists of NumPy arrays")
def test_merge_states_names_the_state_that_differs():
    parts, lses = [np.ones((2, 1, 4), np.float32)] * 3, [np.zeros((1, 2), np.float32)]
    for wrong in (np.ones((3, 1, 4), np.float32), np.ones((2, 1, 4), np.float16)):
        with pytest.raises(ValueError, match=r"outs\[1\]: expected \(2, 1, 4\) float32 as"):
            quire.merge_states([parts[0], wrong, parts[2]], lses * 3)
    with pytest.raises(TypeError, match=r"lses\[2\]: expected a NumPy array .* got list"):
        quire.merge_states(parts, [*(lses * 2), [[0.0, 0.0]]])
    with pytest.raises(ValueError, match="lses: expected at least one state, got none"):
        quire.merge_states(parts, [])
