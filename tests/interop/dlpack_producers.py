# SPDX-License-Identifier: Apache-2.0
"""Tensors of frameworks that are not installed: DLPack as its standard writes it, by ctypes."""

from __future__ import annotations

import ctypes as c

import numpy as np

CODES = {"f": 2, "i": 0, "u": 1}
CPU, CUDA, CUDA_HOST, METAL, CUDA_MANAGED = 1, 2, 3, 8, 13


class DLTensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("device_type", c.c_int32),
        ("device_id", c.c_int32),
        ("ndim", c.c_int32),
        ("code", c.c_uint8),
        ("bits", c.c_uint8),
        ("lanes", c.c_uint16),
        ("shape", c.POINTER(c.c_int64)),
        ("strides", c.POINTER(c.c_int64)),
        ("byte_offset", c.c_uint64),
    ]


class DLManagedTensor(c.Structure):
    _fields_ = [("tensor", DLTensor), ("context", c.c_void_p), ("deleter", c.c_void_p)]


FROM_PY_OBJECT = c.PYFUNCTYPE(c.c_int, c.py_object, c.POINTER(DLTensor))


class ExchangeApi(c.Structure):
    pass


ExchangeApi._fields_ = [
    ("major", c.c_uint32),
    ("minor", c.c_uint32),
    ("prev", c.POINTER(ExchangeApi)),
    ("allocator", c.c_void_p),
    ("managed_from_object", c.c_void_p),
    ("managed_to_object", c.c_void_p),
    ("tensor_from_object", FROM_PY_OBJECT),
    ("current_work_stream", c.c_void_p),
]


def capsule(pointer: object, name: bytes) -> object:
    new = c.pythonapi.PyCapsule_New
    new.restype, new.argtypes = c.py_object, [c.c_void_p, c.c_char_p, c.c_void_p]
    return new(c.cast(pointer, c.c_void_p), name, None)


class Foreign:
    """Owns an array; keeps alive what its exports point to."""

    def __init__(self, array: np.ndarray, device: int = CPU, strides: bool = True) -> None:
        self.array, n = array, array.ndim
        self.shape = (c.c_int64 * n)(*array.shape)
        self.strides = (c.c_int64 * n)(*(s // array.itemsize for s in array.strides))
        self.managed = DLManagedTensor()
        self.managed.tensor = DLTensor(
            array.ctypes.data - 64,
            device,
            3 if device in (CUDA, CUDA_MANAGED) else 0,
            n,
            CODES[array.dtype.kind],
            8 * array.itemsize,
            1,
            self.shape,
            self.strides if strides else None,
            64,  # data begins so many bytes further on
        )


class Method(Foreign):
    """A tensor with __dlpack__ only."""

    def __dlpack__(self, **kwargs: object) -> object:
        return capsule(c.pointer(self.managed), b"dltensor")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.managed.tensor.device_type, self.managed.tensor.device_id)


@FROM_PY_OBJECT
def fill(tensor: Foreign, out: object) -> int:
    out[0] = tensor.managed.tensor  # type: ignore[index]
    return 0


def exchange_api(major: int, prev: ExchangeApi | None = None, function=fill) -> ExchangeApi:
    previous = c.pointer(prev) if prev is not None else None
    return ExchangeApi(major, 3, previous, None, None, None, function, None)


def exchanged(api: ExchangeApi) -> type[Foreign]:
    """A tensor type whose instances are read through this table; it has no __dlpack__."""
    attribute = capsule(c.pointer(api), b"dlpack_exchange_api")
    return type("Exchanged", (Foreign,), {"__dlpack_c_exchange_api__": attribute, "api": api})
