// SPDX-License-Identifier: Apache-2.0
// What kernels share with the host that launches them: markers and tags, no primitives.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define QUIRE_DEVICE __device__ __forceinline__
#define QUIRE_UNROLL _Pragma("unroll")
#else
#define QUIRE_DEVICE inline
#define QUIRE_UNROLL
#endif

namespace quire::device {

// Tags of the 16-bit types. Their values travel as raw bits, two in a uint32_t, the first lowest.
struct Float16 {
  static constexpr bool is_bfloat16 = false;
};
struct BFloat16 {
  static constexpr bool is_bfloat16 = true;
};

inline constexpr int kWarpSize = 32;

// A tensor as bulk copies are told of it: what the driver's cuTensorMapEncodeTiled writes.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

}  // namespace quire::device
