// SPDX-License-Identifier: Apache-2.0
#include "quire/tensor.h"

#include <algorithm>
#include <array>
#include <functional>
#include <sstream>
#include <utility>

#include "check.h"
#include "quire/error.h"

namespace quire {

std::string describe(const TensorView& tensor) {
  std::ostringstream out;
  out << "[";
  const int dims = std::min(tensor.ndim, TensorView::kMaxDims);  // ndim itself may be what is wrong
  for (int i = 0; i < dims; ++i) out << (i ? ", " : "") << tensor.shape[i];
  if (tensor.ndim > dims) out << ", ...";
  out << "] " << name_of(tensor.dtype);
  if (tensor.device.type != DeviceType::kCPU) out << " on " << to_string(tensor.device);
  return out.str();
}

namespace {

std::string describe(const std::vector<Extent>& shape, DType dtype, Device device) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    out << (i ? ", " : "");
    if (shape[i].value >= 0)
      out << shape[i].value;
    else
      out << shape[i].name;
  }
  out << "] " << name_of(dtype);
  if (device.type != DeviceType::kCPU) out << " on " << to_string(device);
  return out.str();
}

}  // namespace

void check_tensor(const std::string& argument, const TensorView& tensor,
                  const std::vector<Extent>& shape, DType dtype, Device device) {
  bool matches = tensor.ndim == static_cast<int>(shape.size()) && tensor.dtype == dtype &&
                 tensor.device == device;
  for (int i = 0; matches && i < tensor.ndim; ++i)
    matches = tensor.shape[i] >= 0 && (shape[i].value < 0 || shape[i].value == tensor.shape[i]);
  QUIRE_CHECK_ARG(matches, argument, ": expected ", describe(shape, dtype, device), ", got ",
                  describe(tensor));
  if (tensor.is_empty()) return;  // strides and address of nothing mean nothing
  QUIRE_CHECK_ARG(tensor.data, argument, ": expected data, got a null pointer");
  const int last = tensor.ndim - 1;
  QUIRE_CHECK_ARG(tensor.shape[last] <= 1 || tensor.strides[last] == 1, argument,
                  ": expected a contiguous last dimension, got stride ", tensor.strides[last]);
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.data);
  QUIRE_CHECK_ARG(address % size_of(dtype) == 0, argument, ": expected an address aligned to ",
                  size_of(dtype), " bytes, got one that is off by ", address % size_of(dtype));
}

void check_output(const std::string& argument, const TensorView& tensor,
                  const std::vector<Extent>& shape, DType dtype, Device device) {
  check_tensor(argument, tensor, shape, dtype, device);
  check_writable(argument, tensor);
}

void check_writable(const std::string& argument, const TensorView& tensor) {
  if (tensor.is_empty()) return;
  QUIRE_CHECK_ARG(!tensor.read_only, argument, ": expected writable memory, got a read-only view");
  for (int i = 0; i < tensor.ndim; ++i)
    QUIRE_CHECK_ARG(tensor.strides[i] != 0 || tensor.shape[i] <= 1, argument,
                    ": expected elements at distinct addresses, got stride 0 in dimension ", i);
}

namespace {

// Bytes [first, second) between the ends of a tensor that is not empty. Strides that lead out of
// all memory may wrap: what comes then means nothing, but is defined.
std::pair<int64_t, int64_t> span(const TensorView& tensor) {
  uint64_t low = 0, high = 1;
  for (int i = 0; i < tensor.ndim; ++i)
    (tensor.strides[i] < 0 ? low : high) +=
        static_cast<uint64_t>(tensor.shape[i] - 1) * static_cast<uint64_t>(tensor.strides[i]);
  const uint64_t address = reinterpret_cast<uintptr_t>(tensor.data);
  return {address + low * size_of(tensor.dtype), address + high * size_of(tensor.dtype)};
}

// Whether the byte at `address` is of an element, for strides that nest: each at least as long as
// all that lies within.
bool covers(const TensorView& tensor, int64_t address) {
  const int64_t element = static_cast<int64_t>(size_of(tensor.dtype));
  const uint64_t begin = static_cast<uint64_t>(span(tensor).first);
  int64_t rest = static_cast<int64_t>(static_cast<uint64_t>(address) - begin);
  if (rest < 0) return false;
  std::array<std::pair<int64_t, int64_t>, TensorView::kMaxDims> dims;  // bytes a step, steps
  for (int i = 0; i < tensor.ndim; ++i) {
    const auto stride = static_cast<uint64_t>(tensor.strides[i]);
    const uint64_t length = tensor.strides[i] < 0 ? 0 - stride : stride;
    dims[i] = {static_cast<int64_t>(length * element), tensor.shape[i] - 1};
  }
  std::sort(dims.begin(), dims.begin() + tensor.ndim, std::greater());
  for (int i = 0; i < tensor.ndim; ++i)
    if (const auto [step, count] = dims[i]; step > 0) rest -= std::min(rest / step, count) * step;
  return rest < element;
}

}  // namespace

bool lie_apart(const TensorView& a, const TensorView& b) {
  if (a.is_empty() || b.is_empty()) return true;
  const auto [a_begin, a_end] = span(a);
  const auto [b_begin, b_end] = span(b);
  return a_end <= b_begin || b_end <= a_begin;
}

bool share_memory(const TensorView& a, const TensorView& b) {
  if (lie_apart(a, b)) return false;
  return covers(a, reinterpret_cast<intptr_t>(b.data)) ||
         covers(b, reinterpret_cast<intptr_t>(a.data));
}

void check_contiguous(const std::string& argument, const TensorView& tensor) {
  if (tensor.is_empty()) return;
  uint64_t stride = 1;  // no memory holds a tensor for which it wraps
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    QUIRE_CHECK_ARG(tensor.shape[i] <= 1 || tensor.strides[i] == static_cast<int64_t>(stride),
                    argument, ": expected a contiguous tensor, got stride ", tensor.strides[i],
                    " instead of ", stride, " in dimension ", i);
    stride *= static_cast<uint64_t>(tensor.shape[i]);
  }
}

}  // namespace quire
