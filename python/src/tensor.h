// SPDX-License-Identifier: Apache-2.0
// Python objects -> TensorView, without a copy.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <memory>
#include <vector>

#include "quire/tensor.h"
#include "tensor_source.h"

namespace nb = nanobind;

namespace quire::python {

// Holds what the views of one call point into, until the call ends.
class TensorArgs {
 public:
  TensorArgs() = default;
  TensorArgs(const TensorArgs&) = delete;
  ~TensorArgs();

  // A NumPy array (ml_dtypes types too), another buffer, or any object with __dlpack__. `name` is
  // what an error message calls it: "paged_attention: q".
  TensorView input(nb::handle object, const char* name);
  TensorView output(nb::handle object, const char* name);           // refuses read-only memory
  TensorView optional_input(nb::handle object, const char* name);   // None: an empty view
  TensorView optional_output(nb::handle object, const char* name);  // likewise
  // A number, kept in `number`, or an array; see kv_scales.h.
  TensorView scale(nb::handle object, const char* name, float& number);

 private:
  TensorView from_numpy(nb::handle object, const char* name);
  TensorView from_exchange(const ExchangeApi& api, nb::handle object, const char* name);
  TensorView from_buffer(nb::handle object, const char* name);
  TensorView from_dlpack(const TensorSource& source, nb::handle object, const char* name);

  // More tensors than any call has: a seat for each is cheaper than a vector.
  static constexpr int kMaxHeld = 32;  // two of a tensor that comes through __dlpack__
  void hold(nb::handle object);
  std::array<PyObject*, kMaxHeld> held_;
  int num_held_ = 0;
  std::vector<Py_buffer> buffers_;
};

// int32 values out of an int32 array (no copy) or of a list of ints (a copy is kept).
class Int32Arg {
 public:
  Int32Arg(nb::handle object, const char* name);
  const int32_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  TensorArgs args_;
  std::vector<int32_t> copy_;
  const int32_t* data_ = nullptr;
  size_t size_ = 0;
};

void bind_attention(nb::module_& m);
void bind_backward(nb::module_& m);
void bind_backend(nb::module_& m);
void bind_block_ranges(nb::module_& m);
void bind_call_log(nb::module_& m);
void bind_chain_key(nb::module_& m);
void bind_kv_cache(nb::module_& m);
void bind_kv_store(nb::module_& m);

}  // namespace quire::python
