// SPDX-License-Identifier: Apache-2.0
// 16-bit floating-point elements in portable C++. Kernels convert whole vectors (simd_*.h); this is
// for single elements, and for the tier that has no vector instructions to rely on.
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

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00)  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // Shifted into place the exponent is too small by 2^112; the product is exact, subnormals too.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | sign);
}

inline void from_float(float x, float& out) { out = x; }

// Round to nearest even.
inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    out.bits = static_cast<uint16_t>(bits >> 16 | 0x40);  // a quiet NaN
  else
    out.bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void from_float(float x, Float16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u)
    half = 0x7e00;
  else if (magnitude >= 0x477ff000u)  // rounds to 2^16 or more
    half = 0x7c00;
  else if (magnitude < 0x38800000u)  // subnormal: adding 1/2 rounds at the right bit
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  else
    half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace quire::cpu
