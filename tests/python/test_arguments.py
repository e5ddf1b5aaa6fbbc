# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments: refused before any work, by name, with what was expected and what came."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
import quire
from hypothesis import given, settings
from hypothesis import strategies as st


def paged_call(**changes):
    """A small correct paged call, with arguments replaced; returns (out, error message)."""
    arguments = {
        "q": np.ones((2, 4, 8), np.float32),
        "k_cache": np.ones((5, 16, 2, 8), np.float32),
        "v_cache": np.ones((5, 16, 2, 8), np.float32),
        "block_table": np.array([[0, 1], [2, 3]], np.int32),
        "seq_lens": np.array([20, 7], np.int32),
        "out": np.full((2, 4, 8), 7.0, np.float32),
        **changes,
    }
    out = arguments["out"]
    before = out.copy() if isinstance(out, np.ndarray) else None
    try:
        quire.paged_attention(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        if before is not None:
            assert np.array_equal(out, before), "written in spite of the refusal"
        return error
    return None


def test_the_unchanged_call_is_accepted():
    assert paged_call() is None


@pytest.mark.parametrize(
    ("changes", "kind", "expected"),
    [
        ({"q": np.ones((2, 8), "f4")}, ValueError, "q: expected 3 dimensions, got (2, 8)"),
        ({"q": np.ones((2, 3, 8), "f4")}, ValueError, "num_kv_heads: expected a divisor"),
        ({"out": np.ones((2, 4, 8), "f2")}, ValueError, "out: expected [2, 4, 8] float32, got"),
        ({"q": np.ones((2, 4, 8), "f2")}, NotImplementedError, "kv_dtype"),
        ({"q": np.ones((2, 4, 8), "f8")}, ValueError, "q: expected float32, float16, bfloat16"),
        ({"q": "x"}, TypeError, "q: expected a NumPy array or an object with __dlpack__, got str"),
        ({"q": None}, TypeError, "q: expected a NumPy array"),
        ({"v_cache": np.ones((5, 8, 2, 8), "f4")}, ValueError, "v_cache: expected [5, 16, 2, 8]"),
        ({"k_cache": np.ones((5, 0, 2, 8), "f4")}, ValueError, "block_size of at least 1"),
        ({"k_cache": np.ones((5, 16, 8, 2), "f4").swapaxes(2, 3)}, ValueError, "contiguous last"),
        (
            {"block_table": np.ones((2, 2), "i8")},
            ValueError,
            "block_table: expected [2, max_blocks",
        ),
        (
            {"block_table": np.ones((3, 2), "i4")},
            ValueError,
            "block_table: expected [2, max_blocks",
        ),
        ({"block_table": np.array([[0, 9], [2, 3]], "i4")}, ValueError, "in [0, 5), got 9"),
        ({"block_table": np.array([[0, -1], [2, 3]], "i4")}, ValueError, "block_table[0, 1]"),
        ({"seq_lens": np.array([20, 99], "i4")}, ValueError, "at least 7 blocks a row"),
        ({"seq_lens": np.array([20, -1], "i4")}, ValueError, "seq_lens[1]: expected a length"),
        ({"seq_lens": np.array([[20, 7]], "i4")}, ValueError, "seq_lens: expected [batch] int32"),
        ({"cu_seqlens_q": np.array([0, 1], "i4")}, ValueError, "cu_seqlens_q: expected [3] int32"),
        ({"cu_seqlens_q": np.array([0, 2, 1], "i4")}, ValueError, "cu_seqlens_q[2]"),
        ({"out": np.ones((2, 4, 9), "f4")}, ValueError, "out: expected [2, 4, 8] float32"),
        ({"out": np.broadcast_to(np.float32(7), (2, 4, 8))}, ValueError, "out: expected writable"),
        ({"lse": np.ones((2, 4), "f4")}, ValueError, "lse: expected [4, 2] float32"),
        ({"sinks": np.ones(3, "f4")}, ValueError, "sinks: expected [4] float32, got [3]"),
        ({"alibi_slopes": np.ones(4, "f2")}, ValueError, "alibi_slopes: expected [4] float32"),
        ({"mask": np.ones((2, 1), "u1")}, ValueError, "mask: expected at least 3 bytes a row"),
        ({"mask": np.ones((2, 4), "i4")}, ValueError, "mask: expected [2, bytes] uint8"),
        ({"mask_kind": "odd"}, ValueError, 'mask_kind: expected "full" or "tree"'),
        ({"window": (-2, 0)}, ValueError, "window: expected (left, right)"),
        ({"window": 5}, TypeError, ""),
        ({"softcap": -1.0}, ValueError, "softcap: expected a finite number >= 0"),
        ({"softcap": float("nan")}, ValueError, "softcap"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number"),
        ({"scale": 0.0}, ValueError, "scale: expected a number other than 0"),
        (
            {"k_scale": 0.5},
            ValueError,
            "k_scale: expected 1, as float32 caches have no scale, got 0.5",
        ),
        ({"stream": 3}, ValueError, "stream: expected None"),
    ],
)
def test_refused_by_name(changes, kind, expected):
    error = paged_call(**changes)
    assert isinstance(error, kind), f"{error!r}"
    assert expected in str(error)


def test_dense_and_ragged_are_refused_by_name():
    x = np.ones((1, 5, 2, 8), np.float32)
    with pytest.raises(ValueError, match="k: expected 4 dimensions"):
        quire.attention(x, x[0], x)
    with pytest.raises(ValueError, match=r"v: expected \[1, 5, 2, 8\] float32"):
        quire.attention(x, x, x[:, :4])
    with pytest.raises(ValueError, match="cu_seqlens_q, cu_seqlens_k: expected both or none"):
        quire.attention(x[0], x[0], x[0], cu_seqlens_q=np.array([0, 5], np.int32))
    cu, short = np.array([0, 5], np.int32), np.array([0, 6], np.int32)
    with pytest.raises(ValueError, match=r"k: expected \[6, 2, 8\]"):
        quire.attention(x[0], x[0], x[0], cu_seqlens_q=cu, cu_seqlens_k=short)


def test_no_kernel_is_explained():
    x = np.ones((1, 2, 1, 4096), np.float32)
    with pytest.raises(NotImplementedError, match="head_dim"):
        quire.attention(x, x, x)
    with pytest.raises(NotImplementedError, match="cuda"):
        quire.Attention(num_heads=4, num_kv_heads=4, head_dim=64, device="cuda")


def test_append_kv_and_copy_blocks_refuse_and_write_nothing():
    cache = np.zeros((4, 16, 2, 8), np.float32)
    k = np.ones((3, 2, 8), np.float32)
    for slots, expected in (
        ([0, 64, 1], r"slot_mapping\[1\]: expected -1 \(skip\) or a slot in \[0, 64\), got 64"),
        ([0, 1, -2], r"slot_mapping\[2\]"),
        ([0, 1], r"slot_mapping: expected \[3\] int64"),
    ):
        with pytest.raises(ValueError, match=expected):
            quire.append_kv(k, k, cache, cache.copy(), np.array(slots, np.int64))
    for pairs, expected in (
        ([[0, 4]], r"src_dst\[0, 1\]: expected a block id in \[0, 4\), got 4"),
        ([[0, 1], [2, 1]], "each destination once"),
        ([[0, 1], [1, 2]], "no destination among the sources"),
        ([[0, 1, 2]], r"src_dst: expected \[n, 2\] int32"),
    ):
        with pytest.raises(ValueError, match=expected):
            quire.copy_blocks(cache, cache.copy(), np.array(pairs, np.int32))
    assert not cache.any()


def rope_of(**changes):
    return quire.Rope(
        **{"cos_sin": np.ones((5, 8), "f4"), "positions": np.zeros(3, "i4"), **changes}
    )


@pytest.mark.parametrize(
    ("rope", "kind", "expected"),
    [
        (1, TypeError, "rope: expected a quire.Rope, got int"),
        (rope_of(interleaved=1), TypeError, "rope.interleaved: expected a bool, got int"),
        (rope_of(cos_sin=None), TypeError, "rope.cos_sin: expected a NumPy array"),
        (rope_of(positions=[0, 1, 2]), TypeError, "rope.positions: expected a NumPy array"),
        (
            rope_of(positions=np.array([0, 5, 1], "i4")),
            ValueError,
            "rope.positions[1]: expected a row of cos_sin in [0, 5), got 5",
        ),
        (rope_of(positions=np.array([0, 1, -1], "i4")), ValueError, "rope.positions[2]"),
        (rope_of(positions=np.zeros(2, "i4")), ValueError, "rope.positions: expected [3] int32"),
        (rope_of(positions=np.zeros(3, "i8")), ValueError, "rope.positions: expected [3] int32"),
        (
            rope_of(cos_sin=np.ones((5, 8), "f2")),
            ValueError,
            "rope.cos_sin: expected [max_position, rotary_dim] float32, got [5, 8] float16",
        ),
        (rope_of(cos_sin=np.ones(8, "f4")), ValueError, "rope.cos_sin: expected [max_position"),
        (rope_of(cos_sin=np.ones((), "f4")), ValueError, "rope.cos_sin: expected [max_position"),
        (
            rope_of(cos_sin=np.ones((5, 7), "f4")),
            ValueError,
            "rope.cos_sin: expected an even rotary_dim in [2, 8] (head_dim), got [5, 7] float32",
        ),
        (rope_of(cos_sin=np.ones((5, 10), "f4")), ValueError, "even rotary_dim in [2, 8]"),
        (rope_of(cos_sin=np.ones((5, 0), "f4")), ValueError, "even rotary_dim in [2, 8]"),
        (rope_of(cos_sin=np.ones((8, 5), "f4").T), ValueError, "contiguous last dimension"),
    ],
)
def test_rope_is_refused_by_name(rope, kind, expected):
    cache, x = np.zeros((4, 16, 2, 8), np.float32), np.ones((3, 2, 8), np.float32)
    with pytest.raises(kind) as error:
        quire.append_kv(x, x, cache, cache, np.arange(3), rope=rope)
    assert str(error.value).startswith("append_kv: rope") and expected in str(error.value)
    with pytest.raises(kind) as error:
        quire.apply_rope(x, rope, out=x)
    assert str(error.value).startswith("apply_rope: rope") and expected in str(error.value)
    assert not cache.any() and (x == 1).all()


def test_apply_rope_refuses_and_writes_nothing():
    x = np.ones((4, 2, 8), np.float32)
    for arguments, out, expected in (
        (x[:3], x[1:], "out: expected x itself or other memory"),
        (x[:3], np.ones((3, 2, 7), "f4"), r"out: expected \[3, 2, 8\] float32, got \[3, 2, 7\]"),
        (x[:3], np.ones((3, 2, 8), "f2"), r"out: expected \[3, 2, 8\] float32"),
        (x[:3, 0], x[:3, 0], r"x: expected \[num_tokens, heads, head_dim\], got \[3, 8\]"),
        (np.ones((3, 2, 8), "i4"), None, "x: expected float32, float16 or bfloat16, got"),
    ):
        with pytest.raises(ValueError, match=f"apply_rope: {expected}"):
            quire.apply_rope(arguments, rope_of(), out=out)
    assert (x == 1).all()


def test_swap_blocks_refuses_and_writes_nothing():
    src, dst = np.ones((4, 16, 2, 8), np.float32), np.zeros((3, 16, 2, 8), np.float32)
    one = [[0, 1]]
    for source, target, pairs, expected in (
        (src, dst, [[0, 3]], r"src_dst\[0, 1\]: expected a block id in \[0, 3\), got 3"),
        (src, dst, [[3, 0], [4, 1]], r"src_dst\[1, 0\]: expected a block id in \[0, 4\), got 4"),
        (src, dst, [[-1, 0]], r"src_dst\[0, 0\]"),
        (src, dst, [[0, 1], [2, 1]], "src_dst: expected each destination once, got block 1 twice"),
        (src, dst, [[0, 1, 2]], r"src_dst: expected \[n, 2\] int32"),
        (src, dst[:, :8], one, r"dst: expected \[num_blocks, 16, 2, 8\] float32, got \[3, 8"),
        (src, dst.astype("f2"), one, r"dst: expected \[num_blocks, 16, 2, 8\] float32"),
        (src[0], dst, one, r"src: expected \[num_blocks, block_size"),
        (src.astype("i4"), dst, one, "src: expected float32, float16, bfloat16, float8_e4m3"),
        (src, src, one, "dst: expected other memory than src"),
        (src[:3], src[2:], one, "dst: expected other memory than src"),
        (src[::-1], src[2:], one, "dst: expected other memory than src"),
    ):
        with pytest.raises(ValueError, match=f"swap_blocks: {expected}"):
            quire.swap_blocks(source, target, np.array(pairs, np.int32))
    assert (src == 1).all() and not dst.any()


def test_views_are_taken_without_a_copy():
    rng = np.random.default_rng(0)
    big = rng.standard_normal((3, 40, 6, 32), np.float32).astype(ml_dtypes.bfloat16)
    q, k = big[:, ::-2, :4, 5:21], big[::-1, 3:33, 4:, 9:25]
    expected = quire.attention(np.ascontiguousarray(q), *[np.ascontiguousarray(k)] * 2)
    out = np.zeros((3, 4, 20, 18), ml_dtypes.bfloat16).transpose(0, 2, 1, 3)[..., 1:17]
    result = quire.attention(q, k, k, out=out)
    assert result is out
    assert np.array_equal(out, expected)


def test_read_only_inputs_are_accepted():
    x = np.ones((1, 5, 2, 8), np.float32)
    x.flags.writeable = False
    assert np.allclose(quire.attention(x, x, x), 1)


class TestPlan:
    attn = quire.Attention(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
    table = np.array([[0, 1], [2, 3]], np.int32)
    cache = np.random.default_rng(1).standard_normal((2, 5, 16, 2, 8)).astype(np.float32)
    q = np.random.default_rng(2).standard_normal((2, 4, 8)).astype(np.float32)

    def test_equals_the_one_shot_call_and_outlives_its_arguments(self):
        table, lengths = self.table.copy(), np.array([20, 7], np.int32)
        plan = self.attn.plan(table, lengths)
        expected = quire.paged_attention(self.q, *self.cache, table, lengths)
        table[:], lengths[:] = -1, 0
        del table, lengths
        out, lse = np.empty_like(self.q), np.empty((4, 2), np.float32)
        assert self.attn.run(plan, self.q, *self.cache, out=out, lse=lse) is out
        assert np.array_equal(out, expected) and np.isfinite(lse).all()
        assert np.array_equal(self.attn.run(plan, self.q, *self.cache), expected)

    def test_lists_are_taken_too(self):
        assert self.attn.plan(self.table, [20, 7], [0, 1, 2]).num_work_items >= 2

    def test_refusals(self):
        for arguments, expected in (
            ((self.table, [20]), r"block_table: expected \[1, max_blocks\] int32"),
            ((self.table, [20, 7], [0, 1]), "cu_seqlens_q: expected"),
            ((self.table, [20, 70]), "at least 5 blocks"),
        ):
            with pytest.raises(ValueError, match=expected):
                self.attn.plan(*arguments)
        with pytest.raises(TypeError, match="seq_lens"):
            self.attn.plan(self.table, ["a", "b"])
        for wrong in ({"dtype": "int8"}, {"device": "tpu"}, {"block_size": 0}, {"num_heads": 0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                quire.Attention(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, **wrong})

    def test_explain_names_the_winner(self):
        assert f"cpu.{quire.cpu_isa()}: chosen" in self.attn.explain()
        plan = self.attn.plan(self.table, [20, 7])
        assert plan.flops == 2 * (20 + 7) * 4 * 16 and plan.kv_bytes == (20 + 7) * 2 * 16 * 4
        assert self.attn.workspace_size(plan) >= 0


SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=5).map(tuple)
ARRAYS = st.builds(
    lambda shape, dtype, value: np.full(shape, value).astype(dtype),
    SHAPES,
    st.sampled_from(["f4", "f2", "f8", "i4", "i8", "u1", "?", "c8"]),
    st.sampled_from([-1, 0, 1, 3]),
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(
    st.sampled_from(["q", "k_cache", "v_cache", "block_table", "seq_lens", "out", "cu_seqlens_q",
                     "lse", "sinks", "alibi_slopes", "mask"]),
    ARRAYS | st.none(),
    min_size=1, max_size=3,
))  # fmt: skip
def test_any_arrays_are_computed_or_refused(changes):
    """Fuzzing of the argument checks: no crash, and no error of another kind."""
    paged_call(**{k: v for k, v in changes.items() if v is not None or k not in ("q", "v_cache")})


@pytest.mark.parametrize(
    ("name", "value", "kind", "expected"),
    [
        ("causal", 1, TypeError, "True or False, got 1 (int)"),
        ("causal", np.True_, TypeError, "True or False, got np.True_ (bool)"),
        ("window", None, TypeError, "(left, right), two ints, got None (NoneType)"),
        ("window", 128, TypeError, "(left, right), two ints, got 128 (int)"),
        ("window", (1.5, 0), TypeError, "(left, right), two ints, got (1.5, 0) (tuple)"),
        ("window", (2**31, 0), ValueError, "(left, right), each 0 to 2147483647 or -1 for open"),
        ("scale", "0.5", TypeError, "a number or None, got '0.5' (str)"),
        ("softcap", None, TypeError, "a number, got None (NoneType)"),
        ("mask_kind", ["tree"], ValueError, '"full" or "tree", got [\'tree\']'),
    ],
)
def test_options_of_a_wrong_type_are_named(name, value, kind, expected):
    x = np.ones((1, 3, 2, 8), np.float32)
    error = paged_call(**{name: value})
    assert isinstance(error, kind) and f"paged_attention: {name}: expected {expected}" in str(error)
    with pytest.raises(kind, match=re.escape(f"attention: {name}: expected {expected}")):
        quire.attention(x, x, x, **{name: value})


def test_out_lies_apart_from_what_is_read():
    """A row that is written early would be read as another one's key or query."""
    rng = np.random.default_rng(3)
    memory = rng.standard_normal((2, 40, 4, 8), np.float32)
    q, k = memory[:, :30], rng.standard_normal((2, 30, 2, 8), np.float32)
    before = memory.copy()
    for name, arguments, out in (
        ("q", (q, k, k), memory[:, 10:]),
        ("q", (q, k, k), memory[:, 29::-1]),
        ("k", (q + 0, q, q + 0), q),
        ("k", (q + 0, q, q + 0), memory[:, 5:35]),
        ("v", (q + 0, q + 0, q), q),
    ):
        with pytest.raises(
            ValueError, match=f"out: expected memory of its own, .* overlaps {name}$"
        ):
            quire.attention(*arguments, out=out)
    cache = rng.standard_normal((4, 16, 4, 8), np.float32)
    assert "overlaps v_cache" in str(
        paged_call(k_cache=cache + 0, v_cache=cache, out=cache[1, 3:5], q=np.ones((2, 4, 8), "f4"))
    )
    assert np.array_equal(memory, before)


def test_out_may_be_q_or_lie_between_its_rows():
    rng = np.random.default_rng(4)
    fused = rng.standard_normal((2, 600, 4, 40), np.float32)  # q, k, v and room for out in a row
    q, k, v, out = (fused[..., i : i + 8] for i in (0, 8, 16, 24))
    expected = quire.attention(q + 0, k + 0, v + 0, causal=True)
    assert np.array_equal(quire.attention(q, k, v, causal=True, out=out), expected)
    assert np.array_equal(quire.attention(q, k, v, causal=True, out=q), expected)
    assert np.array_equal(fused[..., :8], expected)


def test_set_num_threads_refuses_less_than_one():
    with pytest.raises(ValueError, match="at least 1"):
        quire.set_num_threads(0)
