# SPDX-License-Identifier: Apache-2.0
"""Storage of a paged KV cache."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import numpy_dtype

if TYPE_CHECKING:
    import numpy.typing as npt


def _check_count(name: str, count: object) -> None:
    try:
        value = index(count)  # type: ignore[arg-type]  # what is no integer is refused below
    except TypeError:
        raise TypeError(
            f"KVCache: {name}: expected an integer, got {type(count).__name__}"
        ) from None
    if value < 1:
        raise ValueError(f"KVCache: {name}: expected at least 1, got {value}")


class KVCache:
    """Memory of the K and V blocks of all layers, zeroed, in the layout the backend likes best.

    On the CPU a block of one head is contiguous, and so is K of all heads, which are read together,
    with V behind it: ``[num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]``. `k` and
    `v` are views. bfloat16 and float8 need the package ml_dtypes. Scales of a quantised dtype are
    the caller's.

    Raises ValueError for a count below 1 or an unknown dtype, NotImplementedError for a device.

    Example::

        cache = quire.KVCache(num_layers=2, num_blocks=64, block_size=16, num_kv_heads=8,
                              head_dim=128, dtype="float32")
        quire.append_kv(k, v, cache.k(0), cache.v(0), batch.slot_mapping)
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str = "bfloat16",
        device: str = "cpu",
    ) -> None:
        """Allocate the memory; see the class."""
        counts = {
            "num_layers": num_layers,
            "num_blocks": num_blocks,
            "block_size": block_size,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        for name, count in counts.items():
            _check_count(name, count)
        if device != "cpu":
            raise NotImplementedError(f'KVCache: device: expected "cpu", got {device!r}')
        shape = (num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim)
        self._data: npt.NDArray[Any] = np.zeros(shape, numpy_dtype(dtype, "KVCache: dtype"))

    def k(self, layer: int) -> npt.NDArray[Any]:
        """Keys of a layer, a view [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._data[layer, :, 0].transpose(0, 2, 1, 3)

    def v(self, layer: int) -> npt.NDArray[Any]:
        """Values of a layer, a view [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._data[layer, :, 1].transpose(0, 2, 1, 3)

    @property
    def pools(self) -> list[npt.NDArray[Any]]:
        """Each layer's K and V together, a view whose first dimension is the block.

        What `export_blocks` and `import_blocks` take; a block of a layer is contiguous.

        Example::

            ranges = quire.export_blocks(cache.pools, seq.block_table)
        """
        return list(self._data)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers: a payload of a KVStore."""
        return self._data.nbytes // int(self._data.shape[1])

    def read_block(self, block: int) -> npt.NDArray[np.uint8]:
        """A copy of one block of all layers, uint8 [block_bytes].

        Raises IndexError for a block that is none.

        Example::

            store.put(key, cache.read_block(7))
        """
        self._check_block("read_block: block", block)
        return np.ascontiguousarray(self._data[:, block]).view(np.uint8).reshape(-1)

    def write_block(self, block: int, payload: npt.NDArray[np.uint8]) -> None:
        """Writes what `read_block` has read.

        Raises ValueError for a payload of another size, IndexError for a block that is none.

        Example::

            cache.write_block(7, payload)
        """
        self._check_block("write_block: block", block)
        target = self._data[:, block]
        if payload.nbytes != target.nbytes:
            raise ValueError(
                f"write_block: payload: expected {target.nbytes} bytes, got {payload.nbytes}"
            )
        target[...] = payload.view(self._data.dtype).reshape(target.shape)

    def copy_from(self, source: KVCache, src_dst: npt.NDArray[np.int32]) -> None:
        """Copies blocks of all layers from a cache of the same shape, int32 [n, 2] pairs.

        The caches differ in their number of blocks at most: see `like`. Raises ValueError for
        another shape or dtype, IndexError for a block that is none; then nothing was copied.

        Example::

            host.copy_from(cache, manager.swap_out(seq))
        """
        ours, theirs = ((c._data.shape, c._data.dtype) for c in (self, source))
        if (ours[0][:1], ours[0][2:], ours[1]) != (theirs[0][:1], theirs[0][2:], theirs[1]):
            raise ValueError(
                f"copy_from: source: expected [layers, blocks, heads, 2, tokens, dim] {ours[0]} "
                f"{ours[1]} but for the blocks, got {theirs[0]} {theirs[1]}"
            )
        if src_dst.ndim != 2 or src_dst.shape[1] != 2:
            raise ValueError(f"copy_from: src_dst: expected [n, 2], got {src_dst.shape}")
        for cache, column in ((source, 0), (self, 1)):
            for block in (src_dst[:, column].min(initial=0), src_dst[:, column].max(initial=0)):
                cache._check_block(f"copy_from: src_dst[:, {column}]", block)
        self._data[:, src_dst[:, 1]] = source._data[:, src_dst[:, 0]]

    def like(self, num_blocks: int) -> KVCache:
        """A cache of the same layers and dtype with another number of blocks.

        Example::

            host = cache.like(1024)
        """
        _check_count("num_blocks", num_blocks)
        other = object.__new__(KVCache)
        shape = self._data.shape
        other._data = np.zeros((shape[0], num_blocks, *shape[2:]), self._data.dtype)
        return other

    def _check_block(self, argument: str, block: int) -> None:
        """-1 is no block here: it is what tables hold where there is none."""
        if not 0 <= block < self._data.shape[1]:
            raise IndexError(
                f"{argument}: expected a block in [0, {self._data.shape[1]}), got {block}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return self._data.nbytes
