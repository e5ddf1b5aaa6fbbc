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

QUIRE_DEVICE int min(int a, int b) { return a < b ? a : b; }
QUIRE_DEVICE int max(int a, int b) { return a > b ? a : b; }
QUIRE_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline constexpr float kInfinity = __builtin_huge_valf();

}  // namespace quire::device
