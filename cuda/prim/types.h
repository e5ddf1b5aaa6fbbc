// SPDX-License-Identifier: Apache-2.0
// Types that primitives and kernels share. The same source is built by nvcc for the
// device and by a host compiler for the emulator (tests/emulator).
#pragma once

#include <cstdint>

#include "prim/marks.h"

#if !defined(__CUDACC__)
#include <bit>
#include <cmath>

#include "emulator/hopper_instructions.h"
#include "emulator/instructions.h"
#endif

namespace quire::device {

#if defined(__CUDACC__)
// Where a primitive was used matters to the emulator only.
struct Site {
  static constexpr __host__ __device__ Site here() { return {}; }
};
#else
using emulator::Site;
#endif

struct alignas(8) U32x2 {
  uint32_t x, y;
};
struct alignas(16) U32x4 {
  uint32_t x, y, z, w;
};
struct alignas(8) F32x2 {
  float x, y;
};
struct alignas(16) F32x4 {
  float x, y, z, w;
};

// An address in shared memory, in bytes. It is not a pointer, so that every access goes through a
// primitive, where the emulator checks it.
struct SharedAddress {
  uint32_t value;

  QUIRE_DEVICE SharedAddress operator+(uint32_t bytes) const { return {value + bytes}; }
};

}  // namespace quire::device
