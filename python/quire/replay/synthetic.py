# SPDX-License-Identifier: Apache-2.0
"""A synthetic trace, for a replay without a file: chat-like lengths, some prompts shared."""

from __future__ import annotations

import numpy as np

from .trace import Trace

BLOCK_SIZE = 16  # tokens a hash id
_NUM_SYSTEM_PROMPTS = 4
_SYSTEM_PROMPT_BLOCKS = 16  # 256 tokens

DESCRIPTION = (
    "synthetic trace, no real traffic: input 256 tokens of one of 4 system prompts (Zipf) + "
    "lognormal (median 500, sigma 0.9), output lognormal (median 150, sigma 0.7), Poisson arrivals"
)


def synthetic_trace(num_requests: int, seed: int) -> Trace:
    """`num_requests` requests of the distributions that DESCRIPTION states."""
    rng = np.random.default_rng(seed)
    own = np.clip(rng.lognormal(np.log(500), 0.9, num_requests), 1, 8000).astype(np.int64)
    outputs = np.clip(rng.lognormal(np.log(150), 0.7, num_requests), 1, 2000).astype(np.int64)
    weights = 1 / np.arange(1, _NUM_SYSTEM_PROMPTS + 1)
    prompts = rng.choice(_NUM_SYSTEM_PROMPTS, num_requests, p=weights / weights.sum())
    inputs = _SYSTEM_PROMPT_BLOCKS * BLOCK_SIZE + own
    counts = inputs // BLOCK_SIZE  # full blocks have an id
    begin = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    # Ids from 0 on are the system prompts' blocks; all the others are unique.
    ids = np.arange(begin[-1]) + _NUM_SYSTEM_PROMPTS * _SYSTEM_PROMPT_BLOCKS
    shared = np.arange(_SYSTEM_PROMPT_BLOCKS)
    ids[begin[:-1, None] + shared] = prompts[:, None] * _SYSTEM_PROMPT_BLOCKS + shared
    timestamps = np.cumsum(rng.exponential(200.0, num_requests))
    return Trace("synthetic", timestamps, inputs, outputs, ids, begin, BLOCK_SIZE, synthetic=True)
