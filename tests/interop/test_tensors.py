# SPDX-License-Identifier: Apache-2.0
"""Tensors of every kind on their way into C++: no copy, what they are, and by name why not."""

from __future__ import annotations

import sys
import threading
import time

import dlpack_producers as producers
import ml_dtypes
import numpy as np
import pytest
import quire
import torch

NUMPY_DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int32": np.int32,
    "int64": np.int64,
    "int8": np.int8,
    "uint8": np.uint8,
}
TORCH_DTYPES = {name: getattr(torch, name) for name in NUMPY_DTYPES if hasattr(torch, name)} | {
    "float8_e4m3": torch.float8_e4m3fn
}


def refused(probe, tensor, **options) -> str:
    count = sys.getrefcount(tensor)
    with pytest.raises((ValueError, TypeError)) as error:
        probe.inspect(tensor, **options)
    message = str(error.value)
    del error  # it holds the frame, and the frame the tensor
    assert message.startswith("probe: tensor: ")
    assert sys.getrefcount(tensor) == count
    return message


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_numpy_and_ml_dtypes(probe, name):
    array = np.zeros((3, 4, 10), NUMPY_DTYPES[name])
    count = sys.getrefcount(array)
    for view in (array, array[::-1, ::2, 3:7], array.transpose(2, 0, 1), array[1:1], array[0, 0]):
        assert probe.inspect(view) == {
            "address": view.ctypes.data,
            "dtype": name,
            "device": "cpu",
            "shape": list(view.shape),
            "strides": [s // view.itemsize for s in view.strides],
            "read_only": False,
        }
        del view
    assert sys.getrefcount(array) == count


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_torch(probe, name):
    tensor = torch.zeros(3, 4, 10, dtype=TORCH_DTYPES[name])
    count = sys.getrefcount(tensor)
    for view in (tensor, tensor[:, ::2, 3:7], tensor.permute(2, 0, 1), tensor[1:1], tensor[0, 0]):
        found = probe.inspect(view)
        assert found["address"] == view.data_ptr() or view.numel() == 0
        assert found["dtype"] == name and found["device"] == "cpu"
        assert found["shape"] == list(view.shape) and not found["read_only"]
        both = zip(found["strides"], view.stride(), view.shape, strict=True)
        assert all(a == b for a, b, extent in both if extent > 1)
        del view
    assert sys.getrefcount(tensor) == count


def test_torch_subclasses_and_gradients(probe):
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    assert probe.inspect(parameter)["address"] == parameter.data_ptr()
    message = refused(probe, torch.ones(3, requires_grad=True))
    assert "expected a tensor without gradient" in message and "detach()" in message


def test_torch_tensors_without_memory_are_refused(probe):
    assert "could not be exported through DLPack" in refused(probe, torch.ones(3, device="meta"))
    assert "could not be exported through DLPack" in refused(probe, torch.eye(3).to_sparse())
    assert "got torch.complex64" in refused(probe, torch.ones(3, dtype=torch.complex64))


def test_numpy_refusals(probe):
    assert "or uint8, got float64" in refused(probe, np.zeros(3))
    assert "got >f4" in refused(probe, np.zeros(3, ">f4"))
    assert "got bool" in refused(probe, np.zeros(3, bool))
    assert "got int4" in refused(probe, np.zeros(3, ml_dtypes.int4))
    assert "at most 8 dimensions, got 9" in refused(probe, np.zeros((1,) * 9, "f4"))
    odd = np.ndarray((2, 2), "f4", bytes(32), strides=(10, 4))
    assert "strides in whole elements, got 10 bytes" in refused(probe, odd)
    for other in ({}, [1.0, 2.0], object()):
        assert "expected a NumPy array or an object with __dlpack__" in refused(probe, other)
    with pytest.raises(TypeError, match="got NoneType"):
        probe.inspect(None)


def test_read_only_memory_is_read_and_never_written(probe):
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    for tensor in (array, np.broadcast_to(np.float32(1), 3), memoryview(bytes(4))):
        assert probe.inspect(tensor)["read_only"]
        assert "expected writable memory" in refused(probe, tensor, as_output=True)


def test_buffers_that_are_no_arrays(probe):
    data = bytearray(6)
    view = memoryview(data).cast("B", (2, 3))
    found = probe.inspect(view, as_output=True)
    assert found["dtype"] == "uint8" and found["shape"] == [2, 3] and found["strides"] == [3, 1]
    view.release()
    data.append(1)  # BufferError if the probe had kept the buffer
    assert "got unknown" in refused(probe, memoryview(bytes(16)).cast("d"))


@pytest.mark.parametrize("with_strides", [True, False])
def test_any_framework_with_dlpack(probe, with_strides):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    exchanged = producers.exchanged(producers.exchange_api(1))
    for kind in (producers.Method, exchanged):
        found = probe.inspect(kind(array, strides=with_strides), as_output=True)
        assert found["address"] == array.ctypes.data
        assert found["dtype"] == "float32" and found["strides"] == [12, 4, 1]


def test_devices(probe):
    array = np.zeros((2, 2), np.float32)
    exchanged = producers.exchanged(producers.exchange_api(1))
    for kind in (producers.Method, exchanged):
        for device, expected in (
            (producers.CPU, "cpu"),
            (producers.CUDA_HOST, "cpu"),
            (producers.CUDA, "cuda:3"),
            (producers.CUDA_MANAGED, "cuda:3"),
        ):
            assert probe.inspect(kind(array, device))["device"] == expected
        message = refused(probe, kind(array, producers.METAL))
        assert "expected a tensor on the CPU or a CUDA device" in message and "type 8" in message


def test_a_device_without_kernels_is_refused_before_its_memory_is_read():
    on_device = producers.Method(np.zeros((1, 1, 1, 1), np.float32), producers.CUDA)
    with pytest.raises(NotImplementedError, match="copy_blocks: cuda:3"):
        quire.copy_blocks(on_device, on_device, np.zeros((0, 2), np.int32))
    with pytest.raises(NotImplementedError, match="cuda"):
        quire.attention(on_device, on_device, on_device, out=on_device)
    x = np.zeros((1, 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="attention: k: expected .* got .* on cuda:3"):
        quire.attention(x, on_device, x)


def test_the_exchange_api_of_another_major_version(probe):
    array = np.zeros(3, np.float32)
    newer = producers.exchange_api(2, prev=producers.exchange_api(1))
    found = probe.inspect(producers.exchanged(newer)(array))
    assert found["address"] == array.ctypes.data
    unknown = producers.exchanged(producers.exchange_api(2))
    assert "expected a NumPy array" in refused(probe, unknown(array))

    class Both(unknown, producers.Method):  # falls back to the method
        pass

    assert probe.inspect(Both(array))["address"] == array.ctypes.data


def test_an_export_that_fails_says_why(probe):
    class Broken(producers.Method):
        def __dlpack__(self, **kwargs):
            raise BufferError("the tensor is on the moon")

    assert "the tensor is on the moon" in refused(probe, Broken(np.zeros(3, "f4")))


def test_more_types_than_are_remembered(probe):
    array = np.zeros(3, np.float32)
    for _ in range(3):
        for i in range(40):
            tensor = type(f"Tensor{i}", (producers.Method,), {})(array)
            assert probe.inspect(tensor)["address"] == array.ctypes.data
    assert probe.inspect(array)["dtype"] == "float32"


def test_types_without_a_kernel_are_refused_by_name():
    q = np.ones((2, 4, 8), np.float32)
    cache = np.ones((5, 16, 2, 8), ml_dtypes.float8_e4m3fn)
    batch = np.array([[0, 1], [2, 3]], np.int32), np.array([20, 7], np.int32)
    with pytest.raises(ValueError, match="paged_attention: dtype: .* got float8_e5m2"):
        quire.paged_attention(q.astype(ml_dtypes.float8_e5m2), cache, cache, *batch)
    q = q[None].astype(np.int8)
    with pytest.raises(ValueError, match="attention: dtype: .* got int8"):
        quire.attention(q, q, q)


def test_none_is_refused_by_name():
    x = np.ones((1, 5, 2, 8), np.float32)
    for position, name in enumerate("qkv"):
        arguments = [x, x, x]
        arguments[position] = None
        with pytest.raises(TypeError, match=f"attention: {name}: expected a NumPy array"):
            quire.attention(*arguments)
    with pytest.raises(TypeError, match="append_kv: slot_mapping: expected a NumPy array"):
        quire.append_kv(x[0], x[0], x, x.copy(), None)
    with pytest.raises(TypeError, match="copy_blocks: v_cache: expected a NumPy array"):
        quire.copy_blocks(x, None, np.zeros((0, 2), np.int32))


def test_an_optional_array_of_no_dimensions_is_not_taken_for_none():
    x = np.ones((1, 5, 2, 8), np.float32)
    for name in ("sinks", "alibi_slopes", "lse", "mask"):
        with pytest.raises(ValueError, match=f"attention: {name}: expected an array, got one of"):
            quire.attention(x, x, x, **{name: np.array(1.0, np.float32)})


def test_the_foreign_interfaces_are_declared_as_their_owners_do(probe):
    """The probe compiles static assertions where NumPy's and DLPack's headers are installed."""
    from tensor_probe.build import abi_headers

    if not abi_headers():
        pytest.skip("needs apache-tvm-ffi, which brings dlpack/dlpack.h")
    assert probe.abi_checked


def test_other_threads_run_meanwhile():
    """Without the GIL released, the sleeper would wake up after the attention has ended."""
    q = np.ones((1, 3000, 8, 64), np.float32)
    quire.attention(q[:, :10], q[:, :10], q[:, :10])
    spans, ticks = [], []

    def work():
        start = time.perf_counter()
        quire.attention(q, q, q)
        spans.append((start, time.perf_counter()))

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    (start, end) = spans[0]
    assert any(start < tick < end for tick in ticks), (end - start, len(ticks))
