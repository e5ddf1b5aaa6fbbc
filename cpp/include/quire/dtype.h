// SPDX-License-Identifier: Apache-2.0
// Element types that tensors may have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quire/kernel_params.h"

namespace quire {

// Float8E4M3 is e4m3fn: no infinities, largest 448; Float8E5M2 has them, largest finite 57344.
enum class DType : uint8_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt32,
  kInt64,
  kUInt8,
  kFloat8E4M3,
  kFloat8E5M2,
  kInt8
};

constexpr size_t size_of(DType dtype) {  // bytes per element
  switch (dtype) {
    case DType::kUInt8:
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
    case DType::kInt8:
      return 1;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kInt64:
      return 8;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUInt8:
      return "uint8";
    case DType::kFloat8E4M3:
      return "float8_e4m3";
    case DType::kFloat8E5M2:
      return "float8_e5m2";
    case DType::kInt8:
      return "int8";
  }
  return "?";
}

// As kernels name it, which know no integers but int8.
constexpr ElementType element_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return ElementType::kFloat32;
    case DType::kFloat16:
      return ElementType::kFloat16;
    case DType::kFloat8E4M3:
      return ElementType::kFloat8E4M3;
    case DType::kFloat8E5M2:
      return ElementType::kFloat8E5M2;
    case DType::kInt8:
      return ElementType::kInt8;
    default:
      return ElementType::kBFloat16;
  }
}

// What queries and outputs, and caches without scales, are made of.
constexpr bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

// Of outputs. Queries may be codes, too, over caches of such codes.
constexpr DType output_dtype(DType queries) {
  return queries == DType::kFloat8E4M3 ? DType::kBFloat16 : queries;
}

// What caches with scales are made of: an element stands for itself times its scale.
constexpr bool is_quantised(DType dtype) {
  return dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2 || dtype == DType::kInt8;
}

}  // namespace quire
