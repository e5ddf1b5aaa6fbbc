// SPDX-License-Identifier: Apache-2.0
// TensorView: a strided view of memory that somebody else owns. It says what DLPack says.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "quire/device.h"
#include "quire/dtype.h"

namespace quire {

struct TensorView {
  static constexpr int kMaxDims = 8;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  // in elements
  bool read_only = false;

  TensorView() = default;
  // A dense row-major view.
  TensorView(void* data_, DType dtype_, std::initializer_list<int64_t> shape_)
      : data(data_), dtype(dtype_) {
    for (int64_t extent : shape_) shape[ndim++] = extent;
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; --i) strides[i] = stride, stride *= shape[i];
  }

  explicit operator bool() const {
    return ndim > 0;
  }  // false: an optional tensor that was not given

  bool is_empty() const {  // some extent is 0; unlike a product it cannot overflow
    for (int i = 0; i < ndim; ++i)
      if (shape[i] == 0) return true;
    return false;
  }
  int64_t num_elements() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// "[2, 16, 8, 128] float16", as error messages show a tensor.
std::string describe(const TensorView& tensor);

}  // namespace quire
