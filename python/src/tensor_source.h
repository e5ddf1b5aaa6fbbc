// SPDX-License-Identifier: Apache-2.0
// How tensors of one Python type are read: found out once a type, then looked up by its address.
#pragma once

#include <nanobind/nanobind.h>

#include "foreign_abi.h"
#include "quire/dtype.h"

namespace nb = nanobind;

namespace quire::python {

struct TensorSource {
  enum class Kind {
    kNone,      // no tensor
    kNumpy,     // numpy.ndarray and what derives from it: its fields
    kExchange,  // a framework with DLPack's C exchange API (torch): one C call
    kBuffer,    // the buffer protocol
    kDlpack,    // the method __dlpack__, through nanobind
  };
  Kind kind = Kind::kNone;
  const ExchangeApi* api = nullptr;          // of kExchange
  PyObject* requires_grad = nullptr;         // the type's descriptor of that attribute, or null
  descrgetfunc get_requires_grad = nullptr;  // reads it without a look-up by name
  bool is_immutable = false;                 // JAX: DLPack's older form can't say so
};

TensorSource source_of(nb::handle object);

// The element type of an array of one of NumPy's own types or of ml_dtypes'; false: none of ours.
bool parse_numpy_dtype(const NumpyDescr& descr, DType& dtype);

}  // namespace quire::python
