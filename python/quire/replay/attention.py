# SPDX-License-Identifier: Apache-2.0
"""One real attention layer under a replay.

K, V and q of a token are rows of seeded random tables, picked by token id and position. Equal
prefixes thus hold equal data, and any result can be checked without a copy of the cache.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

import quire
from quire._arrays import numpy_dtype

from .policies import Geometry, Policy
from .tokens import Int32Array, mix
from .trace import InputError
from .verify import Verifier

Array = npt.NDArray[Any]

_TABLE_ROWS = 2048


class TokenTables:
    """What q, K and V hold for a token at a position."""

    def __init__(self, geometry: Geometry, seed: int) -> None:
        """Draw the tables."""
        rng = np.random.default_rng(seed)
        dtype = numpy_dtype(geometry.dtype, "--dtype")

        def draw(num_heads: int) -> Array:
            shape = (_TABLE_ROWS, num_heads, geometry.head_dim)
            return rng.standard_normal(shape, np.float32).astype(dtype)

        self.q = draw(geometry.num_heads)
        self.k = draw(geometry.num_kv_heads)
        self.v = draw(geometry.num_kv_heads)

    def rows(self, tokens: Int32Array, positions: Int32Array) -> npt.NDArray[np.int64]:
        """The row of each token."""
        keys = mix(tokens.astype(np.int64) << 32 | positions, 0)
        return (keys % np.uint64(_TABLE_ROWS)).astype(np.int64)


class AttentionLayer:
    """Computes each step of a replay over one buffer, which all policies use in turn."""

    def __init__(
        self, geometry: Geometry, num_slots: int, max_tokens: int, tables: TokenTables
    ) -> None:
        """`num_slots`: tokens of the largest policy; `max_tokens`: of the largest step."""
        dtype = numpy_dtype(geometry.dtype, "--dtype")
        per_slot = 2 * geometry.num_kv_heads * geometry.head_dim
        self._geometry = geometry
        self._tables = tables
        self._buffer = np.zeros(num_slots * per_slot, dtype)
        self._q, self._out = (
            np.empty((max_tokens, geometry.num_heads, geometry.head_dim), dtype) for _ in range(2)
        )
        self._k, self._v = (
            np.empty((max_tokens, geometry.num_kv_heads, geometry.head_dim), dtype)
            for _ in range(2)
        )
        self._verifier: Verifier | None = None

    def start(self, policy: Policy, verifier: Verifier | None) -> None:
        """Lays the buffer out for a policy, and resets the figures."""
        g = self._geometry
        # As quire.KVCache lays out a layer: a block of one head is contiguous, V behind K.
        shape = (policy.num_blocks, g.num_kv_heads, 2, policy.block_size, g.head_dim)
        blocks = self._buffer[: np.prod(shape)].reshape(shape)
        self._k_cache = blocks[:, :, 0].transpose(0, 2, 1, 3)
        self._v_cache = blocks[:, :, 1].transpose(0, 2, 1, 3)
        try:
            self._attention = quire.Attention(
                num_heads=g.num_heads,
                num_kv_heads=g.num_kv_heads,
                head_dim=g.head_dim,
                dtype=g.dtype,
                block_size=policy.block_size,
            )
        except (ValueError, NotImplementedError) as error:
            raise InputError(" ".join(str(error).split())) from error
        self._policy = policy
        self._verifier = verifier
        self.seconds = 0.0  # append_kv, plan and run
        self.prefill_flops = self.prefill_seconds = 0.0  # steps with a prefill in them
        self.decode_bytes = self.decode_seconds = 0.0  # steps of one token a sequence

    def step(self, batch: Any) -> None:
        """Writes K and V of the step's tokens and computes their attention."""
        n = len(batch.token_ids)
        rows = self._tables.rows(batch.token_ids, batch.positions)
        _take(self._tables.q, rows, self._q)
        _take(self._tables.k, rows, self._k)
        _take(self._tables.v, rows, self._v)
        out = self._out[:n]
        start = time.perf_counter()
        if len(batch.copies):
            quire.copy_blocks(self._k_cache, self._v_cache, batch.copies)
        quire.append_kv(self._k[:n], self._v[:n], self._k_cache, self._v_cache, batch.slot_mapping)
        plan = self._attention.plan(batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        self._attention.run(plan, self._q[:n], self._k_cache, self._v_cache, out=out)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if n > len(batch.request_ids):
            self.prefill_flops += plan.flops
            self.prefill_seconds += seconds
        else:
            self.decode_bytes += plan.kv_bytes
            self.decode_seconds += seconds
        if self._verifier is not None:
            requests = np.repeat(batch.request_ids, batch.num_new_tokens)
            self._verifier.see(self._policy.name, requests, batch.positions, out)


def _take(table: Array, rows: npt.NDArray[np.int64], out: Array) -> None:
    """out[:n] = table[rows], on bytes: NumPy is slow to move types that are not its own."""
    raw = np.dtype(f"V{table.dtype.itemsize * table[0].size}")
    source = table.reshape(len(table), -1).view(raw)[:, 0]
    target = out.reshape(len(out), -1).view(raw)[:, 0]
    source.take(rows, out=target[: len(rows)], mode="clip")
