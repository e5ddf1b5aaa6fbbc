# SPDX-License-Identifier: Apache-2.0
"""Token ids for a trace that has none: equal exactly where the trace says that prefixes are equal.

Token j of a stream is the top 31 bits of a + j * b modulo 2^64, with random a and b for each
stream. A stream is a hash id of the trace (j counts from the start of its block), or what is a
request's own (j is the position): the prompt behind its ids, and its output. Two streams agree on
a whole block of tokens only where a and b nearly do, which 2^-60 makes a matter of theory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .trace import Int64Array, Trace

UInt64Array = npt.NDArray[np.uint64]
Int32Array = npt.NDArray[np.int32]

_SHIFT = np.uint64(33)
_ID_SALT, _REQUEST_SALT = 0x1D, 0x2E


def mix(values: npt.NDArray[np.integer], salt: int) -> UInt64Array:
    """splitmix64 of each value: 64 random bits."""
    x = values.astype(np.uint64) + np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TokenSource:
    """Makes the tokens of a trace's requests when they are asked for, and keeps none."""

    def __init__(self, trace: Trace) -> None:
        """Draw each request's own stream."""
        self._trace = trace
        requests = np.arange(len(trace))
        self._start = mix(requests, _REQUEST_SALT)  # [n]
        self._stride = mix(requests, _REQUEST_SALT + 1) | np.uint64(1)  # [n]
        self._offsets = np.arange(trace.hash_block_size, dtype=np.uint64)

    def prompt(self, request: int) -> Int32Array:
        """The input tokens of one request."""
        length = int(self._trace.input_lengths[request])
        shared = self._shared(self._trace.request_ids(request))[:length]
        own = np.arange(len(shared), length, dtype=np.uint64)
        own *= self._stride[request]
        own += self._start[request]
        return np.concatenate([shared, (own >> _SHIFT).astype(np.int32)])

    def output(self, requests: npt.NDArray[np.integer], positions: Int32Array) -> Int32Array:
        """The output token of each request at each position [same shape]."""
        state = self._stride[requests]
        state *= positions.view(np.uint32)
        state += self._start[requests]
        state >>= _SHIFT
        tokens: Int32Array = state.astype(np.int32)
        return tokens

    def sequence(self, request: int, length: int) -> Int32Array:
        """The first `length` tokens of a request's prompt and output."""
        prompt = self.prompt(request)[:length]
        positions = np.arange(len(prompt), length, dtype=np.int32)
        output = self.output(np.full(len(positions), request), positions)
        return np.concatenate([prompt, output])

    def _shared(self, ids: Int64Array) -> Int32Array:
        start = mix(ids, _ID_SALT)[:, None]
        stride = mix(ids, _ID_SALT + 1)[:, None] | np.uint64(1)
        tokens: Int32Array = ((start + self._offsets * stride) >> _SHIFT).astype(np.int32)
        return tokens.reshape(-1)
