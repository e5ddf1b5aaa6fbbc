# SPDX-License-Identifier: Apache-2.0
"""The shapes that are timed, and their tensors: as many sets of K and V as do not fit the cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

CACHE_BYTES = 128 << 20  # over twice the L2 of any GPU here


def count_of_sets(bytes_a_set: int) -> int:
    return 1 if bytes_a_set > CACHE_BYTES else min(16, -(-CACHE_BYTES // bytes_a_set) + 1)


@dataclass
class Prefill:
    device: str
    batch: int
    seq: int
    heads: int
    kv_heads: int
    dim: int
    causal: bool

    def __str__(self) -> str:
        causal = "causal" if self.causal else "full"
        return f"prefill {self.batch}x{self.seq} {self.heads}/{self.kv_heads} d{self.dim} {causal}"

    @property
    def flops(self) -> float:
        pairs = self.seq * (self.seq + 1) / 2 if self.causal else self.seq**2
        return 4.0 * self.batch * self.heads * self.dim * pairs

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).bfloat16()

    @cached_property
    def q(self) -> torch.Tensor:
        return self.random(self.batch, self.seq, self.heads, self.dim)

    @cached_property
    def sets(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shape = (self.batch, self.seq, self.kv_heads, self.dim)
        return [(self.random(*shape), self.random(*shape)) for _ in range(2)]

    @cached_property
    def _paged(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        return {}

    def paged(self, i: int, table: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Set i in blocks of 16 tokens that lie as the table says."""
        i %= len(self.sets)
        if i not in self._paged:
            order = torch.from_numpy(table.ravel().astype(np.int64)).to(self.device)
            self._paged[i] = tuple(
                torch.empty_like(x.view(-1, 16, self.kv_heads, self.dim)).index_copy_(
                    0, order, x.view(-1, 16, self.kv_heads, self.dim)
                )
                for x in self.sets[i]
            )
        return self._paged[i]


@dataclass
class Decode:
    device: str
    lens: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int
    page: int
    kv_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        lens = f"{len(self.lens)}x{self.lens[0]}" if self.is_uniform else "1x64k+31x4k"
        codes = "" if self.kv_dtype == torch.bfloat16 else " e4m3"
        return f"decode {lens} {self.heads}/{self.kv_heads} d{self.dim} page {self.page}{codes}"

    @property
    def is_uniform(self) -> bool:
        return len(set(self.lens)) == 1

    @property
    def kv_bytes(self) -> int:
        return sum(self.lens) * self.kv_heads * self.dim * 2 * self.kv_dtype.itemsize

    @property
    def has_room_for_dense(self) -> bool:
        return self.kv_bytes < 8 << 30

    @cached_property
    def seq_lens(self) -> np.ndarray:
        return np.array(self.lens, np.int32)

    @cached_property
    def table(self) -> np.ndarray:
        counts = -(-self.seq_lens // self.page)
        ids = np.random.default_rng(0).permutation(int(counts.sum())).astype(np.int32)
        table = np.zeros((len(self.lens), int(counts.max())), np.int32)
        for row, count, end in zip(table, counts, np.cumsum(counts), strict=True):
            row[:count] = ids[end - count : end]
        return table

    @cached_property
    def q(self) -> torch.Tensor:
        return torch.randn(len(self.lens), self.heads, self.dim, device=self.device).bfloat16()

    @cached_property
    def caches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shape = (int((-(-self.seq_lens // self.page)).sum()), self.page, self.kv_heads, self.dim)

        def make() -> torch.Tensor:
            values = torch.randn(*shape, device=self.device, dtype=torch.bfloat16)
            return values.to(self.kv_dtype)

        return [(make(), make()) for _ in range(count_of_sets(self.kv_bytes))]

    def dense(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Set i gathered, [batch, kv_heads, seq, dim]."""
        order = torch.from_numpy(self.table.ravel().astype(np.int64)).to(self.device)
        batch, seq = len(self.lens), self.lens[0]
        gathered = (
            x[order].view(batch, -1, self.kv_heads, self.dim)[:, :seq].transpose(1, 2)
            for x in self.caches[i]
        )
        return tuple(x.contiguous() for x in gathered)


def prefills(device: str) -> list[Prefill]:
    """The most telling first, as time may run out."""
    if device == "cpu":
        return [Prefill(device, 1, 64, 4, 2, 64, causal) for causal in (True, False)]
    shapes = [(1, 16384, 128), (4, 4096, 128), (1, 16384, 64), (1, 16384, 256), (16, 1024, 128)]
    return [Prefill(device, b, s, 64, 8, d, c) for b, s, d in shapes for c in (True, False)]


def decodes(device: str) -> list[Decode]:
    if device == "cpu":
        codes = Decode(device, (90, 70), 4, 2, 64, 16, torch.float8_e4m3fn)
        return [
            Decode(device, (100, 100), 4, 2, 64, 16),
            Decode(device, (90, 7), 4, 2, 64, 1),
            codes,
        ]
    base = [(64, 8192), (1, 1024), (1, 4096), (1, 16384), (8, 8192), (64, 1024), (256, 1024)]
    cases = [
        Decode(device, (kv,) * b, 64, 8, 128, 16, dtype)
        for b, kv in base
        for dtype in (torch.bfloat16, torch.float8_e4m3fn)
    ]
    cases += [Decode(device, (kv,) * 1, 32, 8, 128, 16) for kv in (1024, 4096, 16384)]
    cases += [Decode(device, (8192,) * 64, 64, 8, 128, page) for page in (1, 64)]
    cases.append(Decode(device, (65536, *(4096,) * 31), 64, 8, 128, 16))
    cases.append(Decode(device, (2048,) * 64, 32, 32, 128, 16))
    cases += [Decode(device, (8192,) * 64, 64, 8, dim, 16) for dim in (64, 256)]
    return cases
