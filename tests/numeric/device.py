# SPDX-License-Identifier: Apache-2.0
"""`quire` with the device of the run under it: QUIRE_TEST_DEVICE = cpu, cuda, or emulator.

The suite's arrays are NumPy arrays. For a GPU they are moved there and back, with their strides and
their poison; on the emulated GPU of tests/cuda they only claim to be there."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import ml_dtypes
import numpy as np
import quire as package

DEVICE = os.environ.get("QUIRE_TEST_DEVICE", "cpu")
assert DEVICE in ("cpu", "cuda", "emulator"), DEVICE

ALL_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPES = {n: t for n, t in ALL_DTYPES.items() if DEVICE == "cpu" or n != "float32"}


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),  # of DLManagedTensor
        ("deleter", ctypes.c_void_p),
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class EmulatedTensor:
    """An array that says it is on cuda:0. Lives as long as the call that it is given to."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        code = {"i": 0, "u": 1}.get(array.dtype.kind, 2)
        code = {"bfloat16": 4, "float8_e4m3fn": 10}.get(array.dtype.name, code)
        strides = [s // array.itemsize for s in array.strides]
        self._shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self._strides = (ctypes.c_int64 * array.ndim)(*strides)
        self._managed = _DLTensor(
            array.ctypes.data, 2, 0, array.ndim, code, 8 * array.itemsize, 1,
            ctypes.addressof(self._shape), ctypes.addressof(self._strides),
        )  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize])


class Transfer:
    """The arrays of one call on the device, and their way back."""

    def __init__(self) -> None:
        self._moved: dict[int, tuple[np.ndarray, Any]] = {}

    def to(self, array: Any) -> Any:
        if not isinstance(array, np.ndarray):
            return array
        if id(array) not in self._moved:
            moved = EmulatedTensor(array) if DEVICE == "emulator" else self._to_torch(array)
            self._moved[id(array)] = array, moved
        return self._moved[id(array)][1]

    def _to_torch(self, array: np.ndarray) -> Any:
        """Leading columns of an array that is there already stay that."""
        for other, moved in self._moved.values():
            if (
                array.size
                and other.ctypes.data == array.ctypes.data
                and (other.strides, other.shape[:-1]) == (array.strides, array.shape[:-1])
            ):
                return moved[..., : array.shape[-1]]
        return _to_torch(array)

    def back(self, *arrays: Any) -> None:
        for array in arrays:
            if DEVICE == "cuda" and isinstance(array, np.ndarray) and array.size:
                tensor = self._moved[id(array)][1].cpu().contiguous()
                view = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}[array.itemsize]
                import torch

                raw = tensor.view(getattr(torch, view)).numpy()
                _bits(array)[...] = raw.view(_bits(array).dtype)


def _to_torch(array: np.ndarray) -> Any:
    """A CUDA tensor of the same strides and the same misalignment; what lies between its elements
    is NaN."""
    import torch

    item = array.itemsize
    strides = [s // item for s in array.strides]
    span = 1 + sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True)) * (
        array.size > 0
    )
    offset = array.ctypes.data % 16 // item
    name = array.dtype.name
    memory = torch.full(((offset + span) * item,), 0xFF, dtype=torch.uint8, device="cuda")
    tensor = memory.view(getattr(torch, name)).as_strided(array.shape, strides, offset)
    if array.size:
        same = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())
        tensor.copy_(same.view(getattr(torch, name)).reshape(array.shape))
    return tensor


class _OnDevice:
    """The functions of `quire` over NumPy arrays, run on the device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(package, name)

    def attention(self, q, k, v, *, out=None, lse=None, return_lse=False, **options):
        return self._attend(
            package.attention, (q, k, v), (), (*q.shape[:-3], q.shape[-2], q.shape[-3]),
            out, lse, return_lse, options,
        )  # fmt: skip

    def paged_attention(
        self, q, k_cache, v_cache, *indices, out=None, lse=None, return_lse=False, **options
    ):
        return self._attend(
            package.paged_attention, (q, k_cache, v_cache), indices, (q.shape[1], q.shape[0]),
            out, lse, return_lse, options,
        )  # fmt: skip

    def _attend(self, function, tensors, indices, lse_shape, out, lse, return_lse, options):
        moved = Transfer()
        q, _, v = tensors
        if out is None:
            out = np.full((*q.shape[:-1], v.shape[-1]), np.nan, q.dtype)
        if lse is None and return_lse:
            lse = np.full(lse_shape, np.nan, np.float32)
        for name in ("alibi_slopes", "sinks", "mask", "k_scale", "v_scale"):
            if name in options:
                options[name] = moved.to(options[name])
        function(
            *(moved.to(x) for x in tensors),
            *indices,
            out=moved.to(out),
            lse=moved.to(lse),
            **options,
        )
        moved.back(out, lse)
        return (out, lse) if return_lse else out

    def append_kv(
        self, k, v, k_cache, v_cache, slot_mapping, *, rope=None, k_scale=1.0, v_scale=1.0
    ):
        moved = Transfer()
        package.append_kv(
            *(moved.to(x) for x in (k, v, k_cache, v_cache)), slot_mapping, rope=_rope(moved, rope),
            k_scale=moved.to(k_scale), v_scale=moved.to(v_scale),
        )  # fmt: skip
        moved.back(k_cache, v_cache, k_scale, v_scale)

    def apply_rope(self, x, rope, *, out=None):
        moved = Transfer()
        if out is None:
            out = np.empty(x.shape, x.dtype)
        package.apply_rope(moved.to(x), _rope(moved, rope), out=moved.to(out))
        moved.back(out)
        return out

    def copy_blocks(self, k_cache, v_cache, src_dst):
        moved = Transfer()
        package.copy_blocks(moved.to(k_cache), moved.to(v_cache), src_dst)
        moved.back(k_cache, v_cache)

    def swap_blocks(self, src, dst, src_dst):
        moved = Transfer()
        package.swap_blocks(moved.to(src), moved.to(dst), src_dst)
        moved.back(dst)

    def merge_states(self, outs, lses):
        moved = Transfer()
        outs, lses = np.stack(outs), np.stack(lses)
        out = np.empty(outs.shape[1:], outs.dtype)
        lse = np.empty((outs.shape[2], outs.shape[1]), np.float32)
        package._core.merge_states(*(moved.to(x) for x in (outs, lses, out, lse)))
        moved.back(out, lse)
        return out, lse


def _rope(moved: Transfer, rope: Any) -> Any:
    if rope is None:
        return None
    return package.Rope(moved.to(rope.cos_sin), rope.positions, rope.interleaved)


quire: Any = package if DEVICE == "cpu" else _OnDevice()
