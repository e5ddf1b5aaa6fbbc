# SPDX-License-Identifier: Apache-2.0
"""What test_vllm_scenarios.py and test_peer_scenarios.py begin with."""

from __future__ import annotations

import numpy as np
import quire

SIZE = 16


def tokens(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)


def text(common: int, end: int, count: int) -> np.ndarray:
    """`common` tokens that all texts share, then `count` of its own."""
    return np.concatenate([tokens(common), np.full(count, 1000 + end, np.int32)])


def start(manager: quire.KVCacheManager, prompt, **options) -> quire.Sequence:
    seq = manager.create(prompt, **options)
    batch = manager.step([seq], [seq.num_tokens - seq.num_computed_tokens])
    assert batch is not None
    manager.commit([seq])
    manager.validate()
    return seq


def finish(manager: quire.KVCacheManager, *seqs: quire.Sequence) -> None:
    manager.free(list(seqs))
    manager.validate()


def blocks(seq: quire.Sequence) -> list[int]:
    return seq.block_table.tolist()


def evict(manager: quire.KVCacheManager, count: int) -> None:
    """Takes the free blocks and `count` cached ones."""
    seq = manager.create(np.array([-1], np.int32))
    needed = manager.num_free_blocks + count
    assert manager.step([seq], [1], lookahead=needed * SIZE - 1) is not None
    manager.free([seq])
    manager.validate()
