# SPDX-License-Identifier: Apache-2.0
"""The three ways to hand out one memory budget that a replay compares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .trace import InputError, Trace

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DEFAULT_BYTES = 512 * 2**20
_MAX_BLOCKS = 2**24  # some 100 bytes each to keep books
_WATERMARK = 0.01  # share of the blocks that paged policies keep free when they admit


@dataclass(frozen=True)
class Geometry:
    """One attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        """Refuse what no layer can be."""
        if self.dtype not in _DTYPE_BYTES:
            raise InputError(f"--dtype: expected {', '.join(_DTYPE_BYTES)}, got {self.dtype}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"--num-heads: expected a multiple of --num-kv-heads ({self.num_kv_heads}),"
                f" got {self.num_heads}"
            )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token."""
        return 2 * self.num_kv_heads * self.head_dim * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Policy:
    """How a KVCacheManager and a Scheduler are set up."""

    name: str
    block_size: int  # tokens
    num_blocks: int
    prefix_caching: bool
    watermark: float

    @property
    def num_slots(self) -> int:
        """Tokens that the blocks hold."""
        return self.num_blocks * self.block_size


def default_kv_bytes(trace: Trace, geometry: Geometry) -> int:
    """A budget under pressure: a quarter of the trace's tokens, 512 MiB at most.

    Two of the longest requests always fit.
    """
    tokens = int((trace.input_lengths + trace.output_lengths).sum())
    quarter = min(tokens // 4 * geometry.bytes_per_token, _DEFAULT_BYTES)
    return max(quarter, 2 * trace.max_length * geometry.bytes_per_token)


def make_policies(
    trace: Trace, geometry: Geometry, block_size: int, kv_bytes: int | None, max_seqs: int
) -> list[Policy]:
    """Contiguous reservation, paged, and paged with a prefix cache, all within `kv_bytes`.

    Contiguous reservation is paging with one block a sequence, as long as the longest request of
    the trace: a server that does not know its trace would reserve more. `kv_bytes` None: unlimited.
    """
    longest = trace.max_length
    if kv_bytes is None:
        lengths = trace.input_lengths + trace.output_lengths
        num_paged = int(np.sum(-(-lengths // block_size)))  # nothing is ever evicted
        num_contiguous = min(len(trace), max_seqs)
        watermark = 0.0
    else:
        num_tokens = kv_bytes // geometry.bytes_per_token
        least = -(-longest // block_size) * block_size
        if num_tokens < least:
            raise InputError(
                f"--kv-memory: expected {least * geometry.bytes_per_token / 2**20:.0f}MiB or more"
                f" for the longest request ({longest} tokens, {geometry.bytes_per_token} bytes"
                f" each), got {kv_bytes / 2**20:.0f}MiB"
            )
        num_paged, num_contiguous = num_tokens // block_size, num_tokens // longest
        watermark = _WATERMARK
    if num_paged > _MAX_BLOCKS:
        raise InputError(
            f"--kv-memory: expected at most {_MAX_BLOCKS:,} blocks of {block_size} tokens,"
            f" got {num_paged:,}"
        )
    return [
        Policy("contiguous", longest, num_contiguous, False, 0.0),
        Policy("paged", block_size, num_paged, False, watermark),
        Policy("paged + prefix cache", block_size, num_paged, True, watermark),
    ]
