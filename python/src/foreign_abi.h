// SPDX-License-Identifier: Apache-2.0
// The two C interfaces through which tensors are read without a Python call, as their owners
// publish them. Both are frozen until a new major version, which is checked before the first use.
// They are declared here because building quire should take neither package: we use one function
// pointer of DLPack and six fields of NumPy. tests/interop compares them with the real headers.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>  // nb::dlpack::dltensor: the DLTensor of DLPack

#include <cstdint>

namespace nb = nanobind;

namespace quire::python {

// DLPack 1.3, dlpack/dlpack.h: the capsule "dlpack_exchange_api" in the attribute
// __dlpack_c_exchange_api__ of a tensor's type.
struct ExchangeApi {
  static constexpr uint32_t kMajorVersion = 1;

  uint32_t major_version;
  uint32_t minor_version;
  ExchangeApi* prev_api;  // an older table, or null
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Fills a view that lives as long as the tensor; -1 with a Python error set. May be null.
  int (*dltensor_from_py_object_no_sync)(void* py_object, nb::dlpack::dltensor* out);
  void* current_work_stream;
};

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13 };

// NumPy 1.7 to 2.x, numpy/ndarraytypes.h: what PyArray_DATA, PyArray_DIMS, ... read in every
// extension module.
struct NumpyDescr {
  PyObject head;
  PyTypeObject* scalar_type;  // numpy.float32, ml_dtypes.bfloat16, ...
  char kind;
  char type;
  char byteorder;  // '>': not ours
  char flags;
  int type_num;
};

struct NumpyArray {
  PyObject head;
  char* data;
  int ndim;
  Py_ssize_t* shape;
  Py_ssize_t* strides;  // in bytes
  PyObject* base;
  NumpyDescr* descr;
  int flags;
};

inline constexpr int kNumpyWriteable = 0x0400;

enum NumpyTypeNum : int {
  kNumpyInt8 = 1,
  kNumpyUInt8 = 2,
  kNumpyInt = 5,
  kNumpyLong = 7,
  kNumpyLongLong = 9,
  kNumpyFloat32 = 11,
  kNumpyFloat16 = 23,
  kNumpyFirstUserType = 256,
};

}  // namespace quire::python
