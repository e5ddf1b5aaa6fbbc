// SPDX-License-Identifier: Apache-2.0
// python/src/foreign_abi.h against the headers that it stands for. Compiling is the test.
#include "foreign_abi.h"

#include <dlpack/dlpack.h>
#include <numpy/ndarraytypes.h>

#include <cstddef>

namespace quire::python {

using Api = ::DLPackExchangeAPI;
static_assert(DLPACK_MAJOR_VERSION == ExchangeApi::kMajorVersion);
static_assert(sizeof(ExchangeApi) == sizeof(Api));
static_assert(offsetof(ExchangeApi, major_version) == offsetof(Api, header.version.major));
static_assert(offsetof(ExchangeApi, minor_version) == offsetof(Api, header.version.minor));
static_assert(offsetof(ExchangeApi, prev_api) == offsetof(Api, header.prev_api));
static_assert(offsetof(ExchangeApi, dltensor_from_py_object_no_sync) ==
              offsetof(Api, dltensor_from_py_object_no_sync));

using Tensor = nb::dlpack::dltensor;
static_assert(sizeof(Tensor) == sizeof(::DLTensor));
static_assert(offsetof(Tensor, data) == offsetof(::DLTensor, data));
static_assert(offsetof(Tensor, device) == offsetof(::DLTensor, device));
static_assert(offsetof(Tensor, ndim) == offsetof(::DLTensor, ndim));
static_assert(offsetof(Tensor, dtype) == offsetof(::DLTensor, dtype));
static_assert(offsetof(Tensor, shape) == offsetof(::DLTensor, shape));
static_assert(offsetof(Tensor, strides) == offsetof(::DLTensor, strides));
static_assert(offsetof(Tensor, byte_offset) == offsetof(::DLTensor, byte_offset));
static_assert(static_cast<int>(kDLCPU) == ::kDLCPU && static_cast<int>(kDLCUDA) == ::kDLCUDA &&
              static_cast<int>(kDLCUDAHost) == ::kDLCUDAHost &&
              static_cast<int>(kDLCUDAManaged) == ::kDLCUDAManaged);

static_assert(offsetof(NumpyArray, data) == offsetof(::PyArrayObject_fields, data));
static_assert(offsetof(NumpyArray, ndim) == offsetof(::PyArrayObject_fields, nd));
static_assert(offsetof(NumpyArray, shape) == offsetof(::PyArrayObject_fields, dimensions));
static_assert(offsetof(NumpyArray, strides) == offsetof(::PyArrayObject_fields, strides));
static_assert(offsetof(NumpyArray, base) == offsetof(::PyArrayObject_fields, base));
static_assert(offsetof(NumpyArray, descr) == offsetof(::PyArrayObject_fields, descr));
static_assert(offsetof(NumpyArray, flags) == offsetof(::PyArrayObject_fields, flags));
static_assert(offsetof(NumpyDescr, scalar_type) == offsetof(::PyArray_Descr, typeobj));
static_assert(offsetof(NumpyDescr, byteorder) == offsetof(::PyArray_Descr, byteorder));
static_assert(offsetof(NumpyDescr, type_num) == offsetof(::PyArray_Descr, type_num));
static_assert(kNumpyWriteable == NPY_ARRAY_WRITEABLE);
static_assert(static_cast<int>(kNumpyInt8) == NPY_BYTE &&
              static_cast<int>(kNumpyUInt8) == NPY_UBYTE &&
              static_cast<int>(kNumpyInt) == NPY_INT && static_cast<int>(kNumpyLong) == NPY_LONG &&
              static_cast<int>(kNumpyLongLong) == NPY_LONGLONG &&
              static_cast<int>(kNumpyFloat32) == NPY_FLOAT &&
              static_cast<int>(kNumpyFloat16) == NPY_HALF &&
              static_cast<int>(kNumpyFirstUserType) == NPY_USERDEF);

}  // namespace quire::python
