// SPDX-License-Identifier: Apache-2.0
// The primitives of compute capability 9.0a for codes of e4m3: products of warpgroups, whose
// operands both have k along the rows of shared memory, and what makes operands of them.
#pragma once

#include <cstdint>

#include "prim/sm90.h"

namespace quire::device {

// Four floats as codes, rounded to nearest even, `a` lowest; beyond the largest code: that one.
QUIRE_DEVICE uint32_t pack_e4m3(float a, float b, float c, float d) {
#if defined(__CUDACC__)
  uint32_t r;
  asm("{\n"
      ".reg .b16 %%low, %%high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 %%low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 %%high, %4, %3;\n"
      "mov.b32 %0, {%%low, %%high};\n"
      "}"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
#else
  return emulator::narrow_e4m3(a) | emulator::narrow_e4m3(b) << 8 | emulator::narrow_e4m3(c) << 16 |
         static_cast<uint32_t>(emulator::narrow_e4m3(d)) << 24;
#endif
}

// Bytes 0 and 2 of `a`, then those of `b`; and bytes 1 and 3.
QUIRE_DEVICE void part_bytes(uint32_t a, uint32_t b, uint32_t& even, uint32_t& odd) {
#if defined(__CUDACC__)
  even = __byte_perm(a, b, 0x6420);
  odd = __byte_perm(a, b, 0x7531);
#else
  const auto pick = [](uint32_t word) { return (word & 255) | (word >> 8 & 0xFF00); };
  even = pick(a) | pick(b) << 16;
  odd = pick(a >> 8) | pick(b >> 8) << 16;
#endif
}

#if defined(__CUDACC__)
#define QUIRE_WGMMA_64_E4M3                                                      \
  asm volatile(                                                                  \
      "{\n"                                                                      \
      ".reg .pred %%accumulates;\n"                                              \
      "setp.ne.b32 %%accumulates, %37, 0;\n"                                     \
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 " QUIRE_REGISTERS_32 \
      ", {%32, %33, %34, %35}, %36, %%accumulates, 1, 1;\n"                      \
      "}"                                                                        \
      : QUIRE_SUMS_8(0)                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits),                 \
        "r"(static_cast<int>(accumulate)))
#define QUIRE_WGMMA_128_E4M3                                                      \
  asm volatile(                                                                   \
      "{\n"                                                                       \
      ".reg .pred %%accumulates;\n"                                               \
      "setp.ne.b32 %%accumulates, %69, 0;\n"                                      \
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " QUIRE_REGISTERS_64 \
      ", {%64, %65, %66, %67}, %68, %%accumulates, 1, 1;\n"                       \
      "}"                                                                         \
      : QUIRE_SUMS_8(0), QUIRE_SUMS_8(8)                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits),                  \
        "r"(static_cast<int>(accumulate)))
#endif

// d[64][8 kN8] = (accumulate ? d : 0) + a[64][32] b[32][8 kN8], by a warpgroup and in the
// background. `d` lies as in wgmma(). Thread 32w + 4g + t holds of `a` rows 16w + g and
// 16w + g + 8 at columns 4t.., then the same rows at columns 4t + 16... Sums keep some 14 bits of
// their fraction from one step to the next.
template <int kN8>
QUIRE_DEVICE void wgmma_e4m3(float (&d)[kN8][4], const uint32_t (&a)[4], MatrixDescriptor b,
                             bool accumulate, Site site = Site::here()) {
  static_assert(kN8 == 8 || kN8 == 16);
#if defined(__CUDACC__)
  if constexpr (kN8 == 8)
    QUIRE_WGMMA_64_E4M3;
  else
    QUIRE_WGMMA_128_E4M3;
#else
  emulator::multiply({&d[0][0], {a[0], a[1], a[2], a[3]}, 0, b.bits, accumulate},
                     {8 * kN8, false, true, false, true}, false, site);
#endif
}

}  // namespace quire::device
