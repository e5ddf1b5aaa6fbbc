# SPDX-License-Identifier: Apache-2.0
"""Any arguments at all: a call either gives what the oracle makes of the very same arrays, or is
refused by one of three error types with nothing written. Correct calls are made, then damaged."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import quire
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Options, attend, attend_naively
from tolerance import check_out

REFUSALS = (ValueError, TypeError, NotImplementedError)
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
OTHER_DTYPES = ("f4", "f2", "f8", "i4", "i8", "u1", "?", "i2", ml_dtypes.bfloat16)
EXTREMES = (-(2**31), -1, 0, 1, 5, 2**31 - 1)


def sized(draw, low: int, high: int, count: int) -> list[int]:
    return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))


@st.composite
def correct_calls(draw):
    """Keyword arguments of a paged call."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    kv_heads, group, dim, dim_v = (draw(st.integers(1, n)) for n in (3, 4, 20, 20))
    block_size, num_blocks, batch = (draw(st.integers(1, n)) for n in (6, 5, 3))
    q_lens, seq_lens = sized(draw, 0, 5, batch), sized(draw, 0, 14, batch)
    heads, total_q = kv_heads * group, sum(q_lens)
    used = max(-(-s // block_size) for s in seq_lens)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    call = {
        "q": normal(total_q, heads, dim),
        "k_cache": normal(num_blocks, block_size, kv_heads, dim),
        "v_cache": normal(num_blocks, block_size, kv_heads, dim_v),
        "block_table": rng.integers(0, num_blocks, (batch, used + 1), np.int32),
        "seq_lens": np.array(seq_lens, np.int32),
        "cu_seqlens_q": np.cumsum([0, *q_lens], dtype=np.int32),
        "out": np.full((total_q, heads, dim_v), 7, dtype),
        "causal": draw(st.booleans()),
        "window": tuple(sized(draw, -1, 6, 2)),
        "softcap": draw(st.sampled_from((0.0, 3.0))),
    }
    if draw(st.booleans()):
        call["sinks"] = rng.standard_normal(heads, np.float32)
    if draw(st.booleans()):
        call["alibi_slopes"] = rng.uniform(0, 0.5, heads).astype(np.float32)
    return call


def damaged(draw, array: np.ndarray) -> np.ndarray:
    """Another array made of this one: other strides, extents, dtype or entries."""
    axis = draw(st.integers(0, max(array.ndim - 1, 0)))
    match draw(st.integers(0, 8)):
        case 0:
            return array.astype(draw(st.sampled_from(OTHER_DTYPES)))
        case 1:
            return np.flip(array, axis) if array.ndim else array
        case 2:  # the same elements, further apart
            return np.repeat(array, 2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]
        case 3:
            return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, axis, 0)), 0, axis)
        case 4:
            return np.swapaxes(array, axis, -1)
        case 5:
            return np.delete(array, slice(0, 1), axis)
        case 6:
            return array[None] if draw(st.booleans()) else array.reshape(-1)
        case 7:
            return np.broadcast_to(array[:1], array.shape) if array.size else array
        case _:
            changed = array.copy()
            if array.size and array.dtype.kind == "i":
                changed.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(EXTREMES))
            return changed


def by_the_oracle(call: dict) -> tuple[np.ndarray, np.ndarray]:
    """The answer and the naive one, from the arguments alone; fails where they make no sense."""
    k_cache, v_cache, cu = call["k_cache"], call["v_cache"], call["cu_seqlens_q"]
    options = Options(
        causal=call["causal"],
        window=call["window"],
        softcap=call["softcap"],
        alibi_slopes=call.get("alibi_slopes"),
        sinks=call.get("sinks"),
    )
    nothing = np.zeros((0, call["q"].shape[1], v_cache.shape[3]))
    exact, naive = [nothing], [nothing]
    for b, seq_len in enumerate(call["seq_lens"]):
        ids = call["block_table"][b, : -(-seq_len // k_cache.shape[1])]
        # Entries that no row sees (of sequences without rows, before windows) may hold anything.
        ids = np.where((ids >= 0) & (ids < len(k_cache)), ids, 0)
        k, v = (np.concatenate([x[:0, 0], *x[ids]])[:seq_len] for x in (k_cache, v_cache))
        assert len(k) == seq_len
        arguments = call["q"][cu[b] : cu[b + 1]], k, v, options
        exact.append(attend(*arguments)[0])
        naive.append(attend_naively(*arguments))
    return np.concatenate(exact), np.concatenate(naive)


def attempt(call: dict) -> bool:
    """True: computed, and right. False: refused, and nothing written."""
    before = np.array(call["out"])
    try:
        out = quire.paged_attention(**call)
    except REFUSALS as error:
        assert str(error)
        assert np.array_equal(np.asarray(call["out"]), before), "written in spite of the refusal"
        return False
    assert out is call["out"]
    exact, naive = by_the_oracle(call)
    check_out(out, exact, naive)
    return True


@settings(max_examples=100, deadline=None)
@given(correct_calls())
def test_correct_calls_are_computed(call):
    assert attempt(call)


@settings(max_examples=400, deadline=None)
@given(correct_calls(), st.data())
def test_damaged_calls_are_right_or_refused(call, data):
    arrays = [name for name, value in call.items() if isinstance(value, np.ndarray)]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(arrays))
        call[name] = damaged(data.draw, call[name])
    attempt(call)
