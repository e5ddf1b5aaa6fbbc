# SPDX-License-Identifier: Apache-2.0
"""JAX: the same bits as NumPy, under jit, vmap and scan, and a cache that stays where it is."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import quire

if importlib.util.find_spec("jax") is None:
    pytest.skip("needs jax", allow_module_level=True)
if importlib.util.find_spec("quire._jax") is None:
    pytest.skip("quire was built without XLA's headers", allow_module_level=True)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32).astype(dtype)


def same(got: object, expected: object) -> None:
    """JAX arrays and NumPy arrays, or tuples of them, of the same dtypes, shapes and bits."""
    if isinstance(expected, tuple):
        assert isinstance(got, tuple) and len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            same(one, other)
        return
    assert isinstance(got, jax.Array)
    got = np.asarray(got)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.tobytes() == np.ascontiguousarray(expected).tobytes()


def paged_arguments(dtype: type = np.float32) -> tuple[np.ndarray, ...]:
    q, caches = normal(3, 4, 32, dtype=dtype), normal(2, 6, 16, 2, 32, dtype=dtype)
    table = np.array([[4, 1], [2, 0]], np.int32)
    return q, *caches, table, np.array([20, 3], np.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("jit", [False, True])
def test_dense_attention(dtype, jit):
    q, k, v = normal(2, 9, 4, 16, dtype=dtype), *normal(2, 2, 9, 2, 16, dtype=dtype)
    options = {"causal": True, "window": (4, 0), "scale": 0.3, "softcap": 3.0, "return_lse": True}
    arrays = {"sinks": normal(4), "alibi_slopes": normal(4)}
    arrays["mask"] = RNG.integers(0, 256, (2, 9, 2), np.uint8)
    run = functools.partial(quire.attention, **options)
    expected = run(q, k, v, **arrays)
    run = jax.jit(run) if jit else run
    same(run(*map(jnp.asarray, (q, k, v)), **jax.tree.map(jnp.asarray, arrays)), expected)


def test_ragged_attention():
    q, k, v = normal(9, 4, 16), normal(9, 2, 16), normal(9, 2, 24)
    cu = np.array([0, 4, 4, 9], np.int32)
    expected = quire.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    same(jax.jit(quire.attention)(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention(dtype):
    arguments = paged_arguments(dtype)
    cu = np.array([0, 2, 3], np.int32)
    expected = quire.paged_attention(*arguments, cu_seqlens_q=cu, return_lse=True)
    run = jax.jit(functools.partial(quire.paged_attention, return_lse=True))
    same(run(*map(jnp.asarray, arguments), cu_seqlens_q=cu), expected)


def test_merge_states_and_rope():
    outs, lses = normal(2, 3, 4, 16), normal(2, 4, 3)
    same(jax.jit(quire.merge_states)(outs, lses), quire.merge_states(outs, lses))
    same(quire.merge_states(list(jnp.asarray(outs)), list(lses)), quire.merge_states(outs, lses))
    angles = np.outer(np.arange(8), 10.0 ** -np.arange(0, 1, 1 / 8))
    cos_sin = np.hstack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    for interleaved in (False, True):
        rope = quire.Rope(cos_sin, np.array([5, 0, 7], np.int32), interleaved)
        same(quire.apply_rope(jnp.asarray(outs[0]), rope), quire.apply_rope(outs[0], rope))
        cache = np.zeros((2, 2, 4, 4, 16), np.float32)
        slots = np.array([3, -1, 6])
        quire.append_kv(outs[0], outs[1], *cache, slots, rope=rope)
        empty = [jnp.zeros((2, 4, 4, 16))] * 2
        got = quire.append_kv(*map(jnp.asarray, outs), *empty, slots, rope=rope)
        same(got, tuple(cache))


def pointers(*arrays: jax.Array) -> list[int]:
    return [array.unsafe_buffer_pointer() for array in arrays]


def test_donated_caches_are_updated_where_they_are():
    q, k_cache, v_cache, table, lengths = paged_arguments()
    q, k, v = q[:2], normal(2, 2, 32), normal(2, 2, 32)
    slots, copies = np.array([16 + 3, 2 * 16 + 2]), np.array([[0, 5]], np.int32)

    def layer(q, k, v, k_cache, v_cache, slots):
        k_cache, v_cache = quire.copy_blocks(k_cache, v_cache, copies)
        k_cache, v_cache = quire.append_kv(k, v, k_cache, v_cache, slots)
        return quire.paged_attention(q, k_cache, v_cache, table, lengths), k_cache, v_cache

    before = tuple(map(jnp.asarray, (k_cache.copy(), v_cache.copy())))
    caches = tuple(jnp.array(cache, copy=True) for cache in before)
    places = pointers(*caches)
    out, *updated = jax.jit(layer, donate_argnums=(3, 4))(q, k, v, *caches, slots)
    assert pointers(*updated) == places and all(cache.is_deleted() for cache in caches)

    kept, *copied = jax.jit(layer)(q, k, v, *before, slots)
    assert not set(pointers(*copied)) & set(pointers(*before))
    same(before, (k_cache, v_cache))

    quire.copy_blocks(k_cache, v_cache, copies)
    quire.append_kv(k, v, k_cache, v_cache, slots)
    expected = quire.paged_attention(q, k_cache, v_cache, table, lengths)
    same((out, *updated), (expected, k_cache, v_cache))
    same((kept, *copied), (expected, k_cache, v_cache))


def test_scan_over_steps_keeps_one_cache():
    """Ten decode steps of one sequence in one call, the cache as the carry."""
    table = np.array([[2, 0]], np.int32)
    qs, ks, vs = normal(10, 1, 4, 32), *normal(2, 10, 1, 2, 32)

    def step(caches, inputs):
        i, q, k, v = inputs
        slot = jnp.where(i < 8, 2 * 8 + i, i - 8)[None]
        caches = quire.append_kv(k, v, *caches, slot)
        return caches, quire.paged_attention(q, *caches, table, (i + 1)[None])

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(caches):
        return jax.lax.scan(step, caches, (jnp.arange(10), qs, ks, vs))

    caches = tuple(jnp.full((3, 8, 2, 32), jnp.nan).at[0].set(i) for i in (0.0, 1.0))
    places = pointers(*caches)
    caches, outs = decode(caches)
    assert pointers(*caches) == places
    expected = quire.attention(qs[:, 0][None], ks[:, 0][None], vs[:, 0][None], causal=True)
    np.testing.assert_allclose(np.asarray(outs)[:, 0], expected[0], rtol=2e-6, atol=2e-6)


def test_vmap_of_what_is_read():
    q, k, v = normal(3, 2, 5, 4, 16), normal(2, 7, 2, 16), normal(3, 2, 7, 2, 16)
    sinks = normal(3, 4)
    run = jax.vmap(lambda q, k, v, s: quire.attention(q, k, v, sinks=s), (0, None, 0, 0))
    expected = [quire.attention(q[i], k, v[i], sinks=sinks[i]) for i in range(3)]
    same(jax.jit(run)(q, k, v, sinks), np.stack(expected))
    # Two axes, of which no operand has both; the last place first.
    outer = jax.vmap(
        jax.vmap(quire.attention, (0, None, None), out_axes=1), (None, None, 0), out_axes=0
    )
    expected = [[quire.attention(q[j], k, v[i]) for j in range(3)] for i in range(3)]
    same(outer(q, k, v), np.moveaxis(np.array(expected), 1, 2))


def test_vmap_of_what_is_written():
    """Each instance has a cache of its own, whether the given one is mapped or not."""
    k, v, slots = normal(3, 2, 2, 8), normal(2, 2, 8), np.array([[0, 5], [1, -1], [3, 2]])
    caches = normal(2, 3, 2, 4, 2, 8)
    for mapped in (True, False):
        given = caches if mapped else caches[:, 0]
        axis = 0 if mapped else None
        got = jax.vmap(quire.append_kv, (0, None, axis, axis, 0))(
            k, v, *map(jnp.asarray, given), slots
        )
        expected = caches.copy() if mapped else np.repeat(caches[:, :1], 3, 1)
        for i in range(3):
            quire.append_kv(k[i], v, *expected[:, i], slots[i])
        same(got, tuple(expected))


def test_int32_and_int64_slots_are_the_same():
    cache = [jnp.zeros((2, 4, 1, 8))] * 2
    k, v = normal(2, 2, 1, 8)
    narrow = quire.append_kv(jnp.asarray(k), v, *cache, jnp.array([3, -1], jnp.int32))
    with jax.enable_x64(True):
        wide = quire.append_kv(jnp.asarray(k), v, *cache, jnp.array([3, -1], jnp.int64))
    same(wide, tuple(np.asarray(part) for part in narrow))


def test_refused_by_name():
    q = jnp.ones((1, 5, 4, 8))
    runtime_error = jax.errors.JaxRuntimeError
    for arguments, options, kind, message in (
        ((q[0], q, q), {}, ValueError, "attention: q: expected 4 dimensions, got"),
        ((q, q[0], q), {}, runtime_error, "attention: k: expected 4 dimensions"),
        ((q, q, q[:, :4]), {}, runtime_error, r"attention: v: expected \[1, 5, 4, 8\] float32"),
        ((q, q, q), {"mask_kind": "odd"}, ValueError, "attention: mask_kind"),
        ((q, q, q), {"scale": 0.0}, ValueError, "attention: scale"),
        ((q, q, q), {"softcap": -1.0}, runtime_error, "attention: softcap"),
        ((q, q, q), {"sinks": jnp.ones(3)}, runtime_error, r"sinks: expected \[4\] float32"),
        ((q, q, q), {"out": q}, ValueError, "attention: out: expected None with JAX arrays"),
        ((q, q, q), {"stream": 3}, ValueError, "attention: stream: expected None"),
        ((q > 0, q, q), {}, runtime_error, "attention: q: expected float32, .* got XLA's type 1"),
        ((q, q.astype("float16"), q), {}, runtime_error, "kv_dtype|UNIMPLEMENTED|k: expected"),
    ):
        with pytest.raises(kind, match=message):
            jax.block_until_ready(quire.attention(*arguments, **options))
    cache = jnp.ones((2, 4, 1, 8))
    with pytest.raises(runtime_error, match=r"slot_mapping\[0\]: expected -1 .* got 8"):
        jax.block_until_ready(quire.append_kv(cache[:1, 0], cache[:1, 0], cache, cache, [8]))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda q: quire.attention(q, q, q).sum())(q)


def test_options_of_a_wrong_type_are_named():
    x = jnp.ones((1, 3, 2, 8))
    for option, kind, expected in (
        ({"window": None}, TypeError, "two ints, got None"),
        ({"window": (2**31, 0)}, ValueError, "each 0 to 2147483647 or -1"),
        ({"scale": "x"}, TypeError, "a number or None, got 'x'"),
    ):
        with pytest.raises(kind, match=f"^attention: {next(iter(option))}: expected .*{expected}"):
            quire.attention(x, x, x, **option)
    caches = (jnp.ones((2, 4, 2, 8)),) * 2
    batch = (jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
    with pytest.raises(NotImplementedError, match="paged_attention: k_scale: expected 1.0"):
        quire.paged_attention(x[0, :1], *caches, *batch, k_scale=np.ones(2, np.float32))


def test_arguments_may_come_by_keyword_in_any_order():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 2, 8), np.float32))
    out = quire.attention(causal=True, v=x, k=x, q=x)
    assert isinstance(out, jax.Array)
    same(out, quire.attention(x, x, x, causal=True))


def test_the_bindings_read_jax_memory_and_never_write_it(probe):
    for dtype in DTYPES:
        array = jnp.asarray(normal(2, 4, dtype=dtype))
        found = probe.inspect(array)
        assert found["address"] == array.unsafe_buffer_pointer() and found["shape"] == [2, 4]
        assert found["dtype"] == np.dtype(dtype).name and found["read_only"]
        with pytest.raises(ValueError, match="expected writable memory"):
            probe.inspect(array, as_output=True)


def test_the_bindings_wait_for_jax(probe):
    """A plan made of lengths that are still being computed."""
    slow = jax.jit(lambda x: jnp.linalg.matrix_power(x, 64).sum().astype(jnp.int32) * 0 + 3)
    lengths = slow(jnp.ones((500, 500)) / 500)[None]
    attn = quire.Attention(num_heads=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=4)
    plan = attn.plan(np.zeros((1, 1), np.int32), lengths)
    assert plan.kv_bytes == 3 * 2 * 8 * 4


def test_an_installation_without_the_module_says_so():
    code = (
        "import sys, quire; sys.modules['quire._jax'] = None; import jax.numpy as jnp\n"
        "try: quire.attention(*[jnp.ones((1, 5, 2, 8))] * 3)\n"
        "except ImportError as error: sys.exit('QUIRE_JAX=1' not in str(error))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jax_is_loaded_by_the_first_jax_array_only():
    code = (
        "import sys, quire, numpy as np; x = np.ones((1, 5, 2, 8), 'f4'); quire.attention(x, x, x);"
        "assert 'jax' not in sys.modules; import jax.numpy as jnp;"
        "assert 'quire._jax' not in sys.modules; quire.attention(*[jnp.ones((1, 5, 2, 8))] * 3);"
        "assert 'quire._jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
