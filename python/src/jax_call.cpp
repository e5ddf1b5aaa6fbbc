// SPDX-License-Identifier: Apache-2.0
#include "jax_call.h"

#include <algorithm>
#include <sstream>

#include "quire/error.h"

namespace quire::python {
namespace {

using xla::ffi::AnyBuffer;
using xla::ffi::DataType;

DType parse(DataType type, const std::string& name) {
  switch (type) {
    case DataType::F32:
      return DType::kFloat32;
    case DataType::F16:
      return DType::kFloat16;
    case DataType::BF16:
      return DType::kBFloat16;
    case DataType::F8E4M3FN:
      return DType::kFloat8E4M3;
    case DataType::F8E5M2:
      return DType::kFloat8E5M2;
    case DataType::S32:
      return DType::kInt32;
    case DataType::S64:
      return DType::kInt64;
    case DataType::S8:
      return DType::kInt8;
    case DataType::U8:
      return DType::kUInt8;
    default:
      throw InvalidArgument(concat(name,
                                   ": expected float32, float16, bfloat16, float8_e4m3fn, "
                                   "float8_e5m2, int32, int64, int8 or uint8, got XLA's type ",
                                   static_cast<int>(type)));
  }
}

std::vector<std::string> split(std::string_view names) {
  std::vector<std::string> parts;
  std::istringstream in{std::string(names)};
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  return parts;
}

}  // namespace

JaxCall::JaxCall(std::string function, xla::ffi::RemainingArgs args,
                 xla::ffi::RemainingRets results, xla::ffi::Dictionary attributes)
    : function_(std::move(function)), args_(args), results_(results), attributes_(attributes) {
  operands_ = split(attribute<std::string_view>("operands"));
  const auto rank = attribute<int32_t>("rank");
  // Results have the full extents, whatever operands the first of them depends on.
  const auto first = args_.get<AnyBuffer>(0).value().dimensions();
  const auto result = result_buffer(0).dimensions();
  const size_t num_mapped = first.size() - static_cast<size_t>(rank);
  mapped_.assign(result.begin(), result.begin() + num_mapped);
  for (int64_t extent : mapped_) num_instances_ *= extent;
}

void JaxCall::missing(const char* name) const {
  throw InvariantError(concat(function_, ": the call has no attribute ", name));
}

TensorView JaxCall::view(const AnyBuffer& buffer, const std::string& name) const {
  const auto extents = buffer.dimensions();
  TensorView view;
  view.dtype = parse(buffer.element_type(), name);
  view.ndim = static_cast<int>(extents.size() - mapped_.size());
  QUIRE_CHECK_ARG(view.ndim >= 1 && view.ndim <= TensorView::kMaxDims, name, ": expected 1 to ",
                  TensorView::kMaxDims, " dimensions, got ", view.ndim);
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.shape[i] = extents[mapped_.size() + i];
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  // Behind the mapped axes lies one tensor of `stride` elements for each of their indices.
  int64_t rest = instance_, offset = 0;
  for (size_t axis = mapped_.size(); axis-- > 0;) {
    if (extents[axis] > 1) offset += rest % mapped_[axis] * stride;
    rest /= mapped_[axis];
    stride *= extents[axis];
  }
  view.data = static_cast<char*>(buffer.untyped_data()) +
              offset * static_cast<int64_t>(size_of(view.dtype));
  return view;
}

TensorView JaxCall::operand(std::string_view name) const {
  const auto found = std::find(operands_.begin(), operands_.end(), name);
  if (found == operands_.end()) return {};
  const auto buffer = args_.get<AnyBuffer>(static_cast<size_t>(found - operands_.begin()));
  TensorView tensor = view(buffer.value(), concat(function_, ": ", name));
  tensor.read_only = true;
  return tensor;
}

AnyBuffer JaxCall::result_buffer(size_t index) const {
  return *results_.get<AnyBuffer>(index).value();
}

TensorView JaxCall::result(size_t index) const {
  return view(result_buffer(index), concat(function_, ": result ", index));
}

TensorView JaxCall::updated(size_t index, std::string_view name) const {
  const TensorView tensor = result(index);
  QUIRE_INVARIANT(tensor.data == operand(name).data, function_, ": ", name,
                  ": expected XLA to give operand and result one memory");
  return tensor;
}

TensorView JaxCall::slots(std::string_view name) {
  const TensorView tensor = operand(name);
  if (tensor.dtype != DType::kInt32 || tensor.ndim != 1) return tensor;
  slots_.assign(tensor.as<int32_t>(), tensor.as<int32_t>() + tensor.shape[0]);
  return TensorView(slots_.data(), DType::kInt64, {tensor.shape[0]});
}

}  // namespace quire::python
