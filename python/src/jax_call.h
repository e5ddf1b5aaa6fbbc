// SPDX-License-Identifier: Apache-2.0
// One call of an XLA FFI handler: its operands, results and attributes, by name, as TensorViews.
//
// jax.vmap puts the mapped axes in front of every operand and result; an operand that does not
// vary along one has extent 1 there. A handler therefore runs once for each index of these axes
// ("instance"), on views of what lies behind them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "quire/cache_ops.h"
#include "quire/tensor.h"
#include "xla/ffi/api/ffi.h"

namespace quire::python {

class JaxCall {
 public:
  // The attributes are `operands`, names in order, separated by commas, and `rank`, the dimensions
  // of the first operand before vmap; and those that a handler asks for.
  JaxCall(std::string function, xla::ffi::RemainingArgs args, xla::ffi::RemainingRets results,
          xla::ffi::Dictionary attributes);

  // Product of the mapped extents: 1 without vmap.
  int64_t num_instances() const { return num_instances_; }
  void select(int64_t instance) { instance_ = instance; }

  // Views of the selected instance. An operand that was not given is an empty view.
  TensorView operand(std::string_view name) const;
  TensorView result(size_t index) const;
  // Result `index` is operand `name` itself, so that writing to it updates the operand in place.
  TensorView updated(size_t index, std::string_view name) const;
  // slot_mapping as int64, which JAX has only where jax_enable_x64 is set; valid until select().
  TensorView slots(std::string_view name);

  template <class T>
  T attribute(const char* name) const {
    const xla::ffi::ErrorOr<T> value = attributes_.get<T>(name);
    if (!value.has_value()) missing(name);
    return value.value();
  }

 private:
  TensorView view(const xla::ffi::AnyBuffer& buffer, const std::string& name) const;
  xla::ffi::AnyBuffer result_buffer(size_t index) const;
  [[noreturn]] void missing(const char* name) const;

  std::string function_;
  xla::ffi::RemainingArgs args_;
  xla::ffi::RemainingRets results_;
  xla::ffi::Dictionary attributes_;
  std::vector<std::string> operands_;
  std::vector<int64_t> mapped_;  // extents of the mapped axes
  int64_t num_instances_ = 1;
  int64_t instance_ = 0;
  std::vector<int64_t> slots_;
};

}  // namespace quire::python
