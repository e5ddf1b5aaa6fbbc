// SPDX-License-Identifier: Apache-2.0
// Arrays of any element type for tests of kernels, read and written as floats.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/element.h"
#include "quire/dtype.h"
#include "quire/kernel_params.h"

namespace quire::test {

// f.operator()<T>() for the type of elements.
template <class F>
auto with_element(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f.template operator()<cpu::Float16>();
    case DType::kBFloat16:
      return f.template operator()<cpu::BFloat16>();
    case DType::kFloat8E4M3:
      return f.template operator()<cpu::Float8E4M3>();
    case DType::kFloat8E5M2:
      return f.template operator()<cpu::Float8E5M2>();
    case DType::kInt8:
      return f.template operator()<cpu::Int8>();
    default:
      return f.template operator()<float>();
  }
}

// Elements of any type, read and written as floats.
class Array {
 public:
  Array(DType dtype, int64_t size, float fill) : dtype_(dtype), bytes_(size * size_of(dtype)) {
    for (int64_t i = 0; i < size; ++i) set(i, fill);
  }
  void set(int64_t i, float x) {
    with_element(dtype_, [&]<class T>() { put<T>(i, x); });
  }
  float get(int64_t i) const {
    return with_element(dtype_, [&]<class T>() { return at<T>(i); });
  }
  void* data() { return bytes_.data(); }
  int64_t size() const { return static_cast<int64_t>(bytes_.size() / size_of(dtype_)); }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

 private:
  template <class T>
  void put(int64_t i, float x) {
    T element;
    cpu::from_float(x, element);
    std::memcpy(&bytes_[sizeof(T) * i], &element, sizeof(T));
  }
  template <class T>
  float at(int64_t i) const {
    T element;
    std::memcpy(&element, &bytes_[sizeof(T) * i], sizeof(T));
    return cpu::to_float(element);
  }

  DType dtype_;
  std::vector<uint8_t> bytes_;
};

template <class T>
float rounded_as(float x) {
  T element;
  cpu::from_float(x, element);
  return cpu::to_float(element);
}
inline float rounded(DType dtype, double x) {
  const float single = static_cast<float>(x);
  return with_element(dtype, [&]<class T>() { return rounded_as<T>(single); });
}

}  // namespace quire::test
