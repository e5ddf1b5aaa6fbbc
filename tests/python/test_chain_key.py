# SPDX-License-Identifier: Apache-2.0
"""Chain keys against hashlib."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import quire
from hypothesis import given
from hypothesis import strategies as st

INT32 = st.integers(-(2**31), 2**31 - 1)


def expected(tokens: np.ndarray, block_size: int, salt: str | None) -> list[bytes]:
    root = b"quire.chain_key.v1\n" + (b"" if salt is None else b"salt=" + salt.encode())
    keys = [hashlib.sha256(root).digest()]
    for i in range(len(tokens) // block_size):
        block = tokens[i * block_size : (i + 1) * block_size].astype("<i4").tobytes()
        keys.append(hashlib.sha256(keys[-1] + block).digest())
    return keys[1:]


@given(
    st.lists(INT32, max_size=200),
    st.integers(1, 70),
    st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_equal_to_hashlib(tokens, block_size, salt):
    tokens = np.array(tokens, np.int32)
    keys = quire.chain_keys(tokens, block_size, salt)
    assert keys.dtype == np.uint8 and keys.shape == (len(tokens) // block_size, 32)
    assert [key.tobytes() for key in keys] == expected(tokens, block_size, salt)


def test_a_prefix_has_the_same_keys_and_a_change_changes_all_behind_it():
    tokens = np.arange(160, dtype=np.int32)
    keys = quire.chain_keys(tokens, 16)
    assert np.array_equal(quire.chain_keys(tokens[:80], 16), keys[:5])
    tokens[40] += 1
    same = (quire.chain_keys(tokens, 16) == keys).all(axis=1)
    assert same.tolist() == [True] * 2 + [False] * 8


def test_a_list_will_do():
    assert np.array_equal(quire.chain_keys([1, 2], 2), quire.chain_keys(np.int32([1, 2]), 2))


def test_bad_arguments():
    with pytest.raises(ValueError, match="chain_keys: block_size: expected 1 or more, got 0"):
        quire.chain_keys([1], 0)
    with pytest.raises(ValueError, match="chain_keys: token_ids: expected a one-dimensional int32"):
        quire.chain_keys(np.zeros(4, np.int64), 2)
