// SPDX-License-Identifier: Apache-2.0
// Arithmetic primitives. Where the bits of a result must not depend on the code around it, fma()
// and mul() say what is rounded when: compilers fuse plain a * b + c as they like.
#pragma once

#include <cstdint>

#include "prim/types.h"

namespace quire::device {

QUIRE_DEVICE float fma(float a, float b, float c) {
#if defined(__CUDACC__)
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
#else
  return std::fma(a, b, c);
#endif
}

QUIRE_DEVICE float mul(float a, float b) {
#if defined(__CUDACC__)
  float r;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a * b;
#endif
}

QUIRE_DEVICE float max(float a, float b) {  // the other one where one is NaN
#if defined(__CUDACC__)
  float r;
  asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return std::fmax(a, b);
#endif
}

QUIRE_DEVICE float exp2(float x) {
#if defined(__CUDACC__)
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return std::exp2(x);
#endif
}

QUIRE_DEVICE float log2(float x) {
#if defined(__CUDACC__)
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return std::log2(x);
#endif
}

QUIRE_DEVICE float rcp(float x) {
#if defined(__CUDACC__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}

// Two floats rounded to nearest even, `low` in the low half.
template <class Type>
QUIRE_DEVICE uint32_t pack(float low, float high) {
#if defined(__CUDACC__)
  uint32_t r;
  if constexpr (Type::is_bfloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return emulator::narrow<Type>(low) | static_cast<uint32_t>(emulator::narrow<Type>(high)) << 16;
#endif
}

// One 16-bit value as a float, exactly.
template <class Type>
QUIRE_DEVICE float widen(uint16_t bits) {
#if defined(__CUDACC__)
  float r;
  if constexpr (Type::is_bfloat16)
    asm("mov.b32 %0, {%1, %2};" : "=f"(r) : "h"(static_cast<uint16_t>(0)), "h"(bits));
  else
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
#else
  return emulator::widen<Type>(bits);
#endif
}

// The e4m3 values of bytes 0 and 2, and of bytes 1 and 3, as float16, exactly.
QUIRE_DEVICE void widen_e4m3(uint32_t bytes, uint32_t& even, uint32_t& odd) {
#if defined(__CUDACC__)
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
      : "=r"(even)
      : "h"(static_cast<uint16_t>(__byte_perm(bytes, 0, 0x4420))));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;"
      : "=r"(odd)
      : "h"(static_cast<uint16_t>(__byte_perm(bytes, 0, 0x4431))));
#else
  // In the upper byte of a half, one bit to the right, it is a float16 2^8 too small; NaN is made
  // one by a bit more of exponent.
  const uint32_t words[2] = {bytes << 8, bytes};
  uint32_t results[2];
  QUIRE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t magnitude = words[i] & 0x7F007F00u;
    const uint32_t nan = (magnitude + 0x01000100u) & 0x80008000u;
    const uint32_t small = (words[i] & 0x80008000u) | (magnitude | nan) >> 1;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(results[i]) : "r"(small), "r"(0x5C005C00u));
  }
  even = results[0];
  odd = results[1];
#endif
#else
  const auto half = [bytes](int i) {
    return static_cast<uint32_t>(emulator::widen_e4m3(static_cast<uint8_t>(bytes >> 8 * i)));
  };
  even = half(0) | half(2) << 16;
  odd = half(1) | half(3) << 16;
#endif
}

QUIRE_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDACC__)
  return __float_as_uint(x);
#else
  return std::bit_cast<uint32_t>(x);
#endif
}

QUIRE_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

QUIRE_DEVICE int min(int a, int b) { return a < b ? a : b; }
QUIRE_DEVICE int max(int a, int b) { return a > b ? a : b; }
QUIRE_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline constexpr float kInfinity = __builtin_huge_valf();

}  // namespace quire::device
