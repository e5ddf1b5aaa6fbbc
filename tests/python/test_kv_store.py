# SPDX-License-Identifier: Apache-2.0
"""HostStore and FileStore from Python: buffers in and out, restart, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import quire

KEYS = quire.chain_keys(np.arange(64, dtype=np.int32), block_size=8)
BLOCK = 4096


def payload(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, BLOCK, dtype=np.uint8)


@pytest.fixture(params=["host", "file"])
def store(request, tmp_path):
    if request.param == "host":
        return quire.HostStore(capacity_bytes=4 * BLOCK, block_bytes=BLOCK)
    return quire.FileStore(str(tmp_path / "kv"), capacity_bytes=4 * BLOCK, block_bytes=BLOCK)


def test_there_and_back(store):
    assert isinstance(store, quire.KVStore) and store.block_bytes == BLOCK
    out = np.zeros(BLOCK, np.uint8)
    assert store.get(KEYS[0], out).wait() == "missing"
    for i in range(3):
        assert store.put(KEYS[i], payload(i)).wait() == "done"
    for i in range(3):
        assert store.contains(KEYS[i])
        assert store.get(KEYS[i], out).wait() == "done"
        assert np.array_equal(out, payload(i))
    assert store.erase(KEYS[1].tobytes()) and not store.erase(KEYS[1])
    assert store.stats()["num_blocks"] == 2 and store.stats()["hits"] == 3


def test_any_contiguous_buffer_and_a_dropped_ticket(store):
    block = np.arange(BLOCK // 4, dtype=np.float32).reshape(2, -1)
    store.put(KEYS[0].tobytes(), block)
    out = np.empty_like(block)
    ticket = store.get(bytearray(KEYS[0].tobytes()), out)
    store.drain()
    assert ticket.outcome == "done" and np.array_equal(out, block)


def test_the_least_recently_used_goes(store):
    for i in range(5):
        store.put(KEYS[i], payload(i)).wait()
    assert [store.contains(key) for key in KEYS[:5]] == [False, True, True, True, True]
    assert store.stats()["evicted"] == 1


def test_a_full_queue_is_none(tmp_path):
    store = quire.HostStore(1 << 28, 1 << 26, max_pending=1)
    block = np.zeros(1 << 26, np.uint8)
    tickets = [store.put(KEYS[i], block) for i in range(4)]
    assert None in tickets
    assert store.stats()["not_taken"] == tickets.count(None)


def test_restart_and_a_rotten_file(tmp_path):
    store = quire.FileStore(str(tmp_path), 8 * BLOCK, BLOCK, identity="a")
    for i in range(2):
        store.put(KEYS[i], payload(i)).wait()
    with pytest.raises(ValueError, match="no other store has open"):
        quire.FileStore(str(tmp_path), 8 * BLOCK, BLOCK, identity="a")
    del store
    with pytest.raises(ValueError, match="identity b"):
        quire.FileStore(str(tmp_path), 8 * BLOCK, BLOCK, identity="b")
    rotten = next(tmp_path.glob(f"*-{KEYS[1].tobytes().hex()}.kv"))
    rotten.write_bytes(rotten.read_bytes()[:-1] + b"?")
    store = quire.FileStore(str(tmp_path), 8 * BLOCK, BLOCK, identity="a")
    out = np.zeros(BLOCK, np.uint8)
    assert store.get(KEYS[0], out).wait() == "done" and np.array_equal(out, payload(0))
    assert store.get(KEYS[1], out).wait() == "missing"
    assert store.stats()["dropped"] == 1


def test_refusals(store):
    with pytest.raises(ValueError, match="put: key: expected 32 bytes, got 3"):
        store.put(b"abc", payload(0))
    with pytest.raises(ValueError, match="put: payload: expected 4096 bytes, got 2"):
        store.put(KEYS[0], b"ab")
    with pytest.raises(TypeError, match="get: out: expected a contiguous writable buffer"):
        store.get(KEYS[0], bytes(BLOCK))
    with pytest.raises(TypeError, match="put: payload: expected a contiguous buffer"):
        store.put(KEYS[0], payload(0).reshape(64, 64).T)
    with pytest.raises(OSError, match="nowhere"):
        quire.FileStore("/proc/nowhere", BLOCK, BLOCK)
