// SPDX-License-Identifier: Apache-2.0
// 16-bit floating-point elements in portable C++. Kernels convert whole vectors (simd_*.h); this is
// for single elements, and for the tier that has no vector instructions to rely on. No conversion
// branches, so that a compiler can make vectors of a loop over elements.
#pragma once

#include <bit>
#include <cstdint>

namespace quire::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// `a` where the condition holds, else `b`: of ?: a compiler would make a branch again.
inline uint32_t select(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (a & mask) | (b & ~mask);
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const int32_t magnitude = x.bits & 0x7fff;
  // Shifted into place the exponent is too small by 2^112; the product is exact, subnormals too.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  const uint32_t other = 0x7f800000u | (magnitude & 0x3ff) << 13;  // infinity, NaN
  return std::bit_cast<float>(sign | select(magnitude < 0x7c00, finite, other));
}

inline void from_float(float x, float& out) { out = x; }

// Round to nearest even.
inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x40;
  out.bits = static_cast<uint16_t>(select(x == x, rounded, quiet_nan));
}

inline void from_float(float x, Float16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  int32_t magnitude = bits & 0x7fffffff;  // signed: what vectors can compare
  magnitude = select(magnitude < 0x47800000, magnitude, 0x47800000);  // 2^16 becomes infinity
  // Its power of two; subnormals have that of the smallest normal number.
  int32_t power = magnitude & 0x7f800000;
  power = select(power > 0x38800000, power, 0x38800000);
  // Adding 2^13 times that rounds at the right bit and leaves the significand, with its leading 1,
  // in the low bits; that 1 joins the exponent.
  const int32_t large = power + (13 << 23);
  const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(large);
  const uint32_t significand = std::bit_cast<uint32_t>(sum) - large;
  const uint32_t exponent = (power - 0x38800000) >> 13;
  out.bits =
      static_cast<uint16_t>((bits >> 16 & 0x8000) | select(x == x, exponent + significand, 0x7e00));
}

}  // namespace quire::cpu
