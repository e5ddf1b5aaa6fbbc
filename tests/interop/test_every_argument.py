# SPDX-License-Identifier: Apache-2.0
"""Every tensor argument of every operation, in every state that a framework may hand over: taken,
or refused with an error that names it, and then nothing has been written."""

from __future__ import annotations

import dlpack_producers as producers
import numpy as np
import pytest
import quire
import torch

F4, I4, I8 = np.float32, np.int32, np.int64


def arguments() -> dict[str, dict[str, np.ndarray]]:
    """What each operation is given where all is well."""
    cache = {"k_cache": np.zeros((5, 4, 2, 8), F4), "v_cache": np.zeros((5, 4, 2, 8), F4)}
    rows = {"k": np.ones((3, 2, 8), F4), "v": np.ones((3, 2, 8), F4)}
    dense = {name: np.ones((2, 3, 2, 8), F4) for name in "qkv"}
    logits = {"alibi_slopes": np.ones(2, F4), "sinks": np.ones(2, F4)}
    batch = {"block_table": np.zeros((2, 2), I4), "seq_lens": np.full(2, 3, I4)}
    return {
        "attention": {
            **dense,
            **logits,
            "out": np.zeros((2, 3, 2, 8), F4),
            "lse": np.zeros((2, 2, 3), F4),
            "mask": np.full((2, 3, 2), 255, np.uint8),
        },
        "paged_attention": {
            "q": np.ones((3, 2, 8), F4),
            **cache,
            **batch,
            **logits,
            "cu_seqlens_q": np.array([0, 1, 3], I4),
            "out": np.zeros((3, 2, 8), F4),
            "lse": np.zeros((2, 3), F4),
            "mask": np.full((3, 2), 255, np.uint8),
        },
        "append_kv": {**rows, **cache, "slot_mapping": np.array([4, 5, 6], I8)},
        "copy_blocks": {**cache, "src_dst": np.array([[0, 1], [2, 3]], I4)},
        "swap_blocks": {
            "src": np.ones((5, 4, 2, 8), F4),
            "dst": np.zeros((5, 4, 2, 8), F4),
            "src_dst": np.array([[0, 1], [2, 3]], I4),
        },
        "merge_states": {"outs": np.ones((2, 3, 2, 8), F4), "lses": np.zeros((2, 2, 3), F4)},
        "attention_backward": {
            "dout": np.ones((2, 3, 2, 8), F4),
            **dense,
            "out": np.ones((2, 3, 2, 8), F4),
            "lse": np.zeros((2, 2, 3), F4),
            "sinks": np.ones(2, F4),
        },
    }


WRITTEN = {
    "attention": ["out", "lse"],
    "paged_attention": ["out", "lse"],
    "append_kv": ["k_cache", "v_cache"],
    "copy_blocks": ["k_cache", "v_cache"],
    "swap_blocks": ["dst"],
    "merge_states": [],
    "attention_backward": [],
}
PLACES = [(function, name) for function, given in arguments().items() for name in given]


def read_only(array):
    array.flags.writeable = False
    return array


def reversed_last(array):
    """The same values, the last dimension backwards in memory."""
    return np.ascontiguousarray(array[..., ::-1])[..., ::-1]


def strided_last(array):
    return np.repeat(array, 2, axis=-1)[..., ::2]


BAD = {
    "on another kind of device": lambda array: producers.Method(array, producers.METAL),
    "on a GPU": lambda array: producers.Method(array, producers.CUDA),
    "without memory": lambda array: torch.from_numpy(array).to("meta"),
    "with gradients": lambda array: torch.from_numpy(array.astype(F4)).requires_grad_(),
    "sparse": lambda array: torch.from_numpy(array).to_sparse(),
    "of doubles": lambda array: array.astype(np.float64),
    "of big-endian numbers": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "of objects": lambda array: array.astype(object),
    "with a strided last dimension": strided_last,
    "with a last dimension backwards": reversed_last,
    "of too many dimensions": lambda array: array.reshape((1,) * 5 + array.shape),
    "of no dimensions": lambda array: array.reshape(-1)[0].reshape(()),
    "a list": lambda array: array.tolist(),
}


def call(function: str, given: dict[str, object]) -> object:
    return getattr(quire, function)(**given)


def test_as_they_are_all_are_taken():
    for function, given in arguments().items():
        call(function, given)


@pytest.mark.parametrize("state", BAD)
@pytest.mark.parametrize(("function", "name"), PLACES)
def test_refused_by_name(function, name, state):
    given = arguments()[function]
    if function == "merge_states" and state == "a list":
        pytest.skip("a list of states is taken")
    if state == "of big-endian numbers" and given[name].itemsize == 1:
        pytest.skip("a byte has no order")
    before = {key: array.copy() for key, array in given.items()}
    bad = given | {name: BAD[state](given[name])}
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
        call(function, bad)
    message = str(error.value)
    is_elsewhere = state == "on a GPU" and "cuda:3" in message  # and which tensor is not there
    assert is_elsewhere or (message.startswith(f"{function}: ") and name in message), message
    assert len(message) < 400, message
    for key in WRITTEN[function]:
        assert np.array_equal(given[key], before[key]), key


@pytest.mark.parametrize(("function", "name"), PLACES)
def test_read_only_memory_is_read_but_not_written(function, name):
    given = arguments()[function]
    read_only(given[name])
    if name in WRITTEN[function]:
        with pytest.raises(ValueError, match=f"{function}: {name}: expected writable memory"):
            call(function, given)
    else:
        call(function, given)


@pytest.mark.parametrize("kind", ["torch", "another framework's", "backwards"])
@pytest.mark.parametrize(("function", "name"), PLACES)
def test_dlpack_and_negative_strides_are_taken(function, name, kind):
    """With the bits that plain arrays give."""
    given, plain = arguments()[function], arguments()[function]
    results = call(function, plain)
    array = given[name]
    if kind == "torch":
        given[name] = torch.from_numpy(array)
    elif kind == "another framework's":
        if name in ("q", "outs"):
            pytest.skip("new outputs are in the framework of this argument")
        given[name] = producers.Method(array)
    elif array.ndim > 1:
        array = given[name] = np.ascontiguousarray(array[::-1])[::-1]
    again = call(function, given)
    for key in WRITTEN[function]:
        assert np.array_equal(array if key == name else given[key], plain[key]), key
    if not WRITTEN[function]:
        for expected, found in zip(results, again, strict=True):
            assert np.array_equal(expected, np.asarray(found))


@pytest.mark.parametrize(("function", "name"), PLACES)
def test_nothing_in_one_dimension(function, name):
    """Zero-size arrays are taken where the others agree, else refused by name; never a crash."""
    given = arguments()[function]
    for axis in range(given[name].ndim):
        empty = np.delete(given[name], slice(None), axis=axis)
        try:
            call(function, given | {name: empty})
        except (ValueError, NotImplementedError) as error:
            # What describes a model is checked in one place for attention, paged or not.
            assert str(error).startswith((f"{function}: ", "attention: ")), error
