// SPDX-License-Identifier: Apache-2.0
// What kernels share with the host that launches them: markers and tags, no primitives.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define QUIRE_DEVICE __device__ __forceinline__
#define QUIRE_UNROLL _Pragma("unroll")
#define QUIRE_UNROLL_BY(count) QUIRE_PRAGMA(unroll count)
#define QUIRE_PRAGMA(text) _Pragma(#text)
#else
#define QUIRE_DEVICE inline
#define QUIRE_UNROLL
#define QUIRE_UNROLL_BY(count)
#endif

namespace quire::device {

// Tags of the element types. Values travel as raw bits, packed in a uint32_t, the first lowest.
// Products are computed with elements of type Product.
struct Float16 {
  static constexpr bool is_bfloat16 = false;
  using Bits = uint16_t;
  using Product = Float16;
};
struct BFloat16 {
  static constexpr bool is_bfloat16 = true;
  using Bits = uint16_t;
  using Product = BFloat16;
};
// Of K and V only: sign, 4 bits of exponent, 3 of fraction; all ones is NaN. Every value is one of
// Float16, too.
struct Float8E4M3 {
  using Bits = uint8_t;
  using Product = Float16;
};

inline constexpr int kWarpSize = 32;

// A tensor as bulk copies are told of it: what the driver's cuTensorMapEncodeTiled writes.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

}  // namespace quire::device
