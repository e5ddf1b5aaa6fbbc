// SPDX-License-Identifier: Apache-2.0
// 16-bit floating types on the host: exact widening, round-to-nearest-even narrowing.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace quire::emulator {

// Type is a tag with `static constexpr bool is_bfloat16`.
inline float widen_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline float widen_float16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | mantissa << 13);
  if (exponent > 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -magnitude : magnitude;
}

inline uint16_t narrow_bfloat16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint16_t narrow_float16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  // Adding 2^k puts the last bit that float16 keeps at the end of the float's mantissa, where the
  // addition itself rounds. Below 2^-14 the last bit stays at 2^-24.
  int exponent;
  std::frexp(magnitude, &exponent);
  const float anchor = std::ldexp(1.0f, std::max(exponent, -13) + 12);
  const float rounded = (magnitude + anchor) - anchor;
  if (rounded < std::ldexp(1.0f, -14)) return sign | static_cast<uint16_t>(std::ldexp(rounded, 24));
  const uint32_t bits = std::bit_cast<uint32_t>(rounded);
  return sign | static_cast<uint16_t>((bits >> 13) - (112u << 10));
}

inline uint16_t widen_e4m3(uint8_t bits) {  // to float16, exactly
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if ((bits & 127) == 127) return static_cast<uint16_t>((bits & 128) << 8 | 0x7FFF);
  const float magnitude = exponent > 0 ? std::ldexp(8.0f + fraction, exponent - 10)
                                       : std::ldexp(static_cast<float>(fraction), -9);
  return narrow_float16(bits & 128 ? -magnitude : magnitude);
}

inline uint8_t narrow_e4m3(float value) {  // beyond the largest: the largest
  if (std::isnan(value)) return 0x7F;
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::min(std::fabs(value), 448.0f);
  int exponent;
  std::frexp(magnitude, &exponent);
  const float step = std::ldexp(1.0f, std::max(exponent - 1, -6) - 3);
  const float rounded = std::nearbyint(magnitude / step) * step;
  if (rounded < std::ldexp(1.0f, -6)) return sign | static_cast<uint8_t>(std::ldexp(rounded, 9));
  const float fraction = std::frexp(rounded, &exponent);
  return sign | static_cast<uint8_t>((exponent + 6) << 3 | static_cast<int>(fraction * 16 - 8));
}

// All 65,536 values of a type, for the many look-ups of an emulated mma.
template <class Type>
const float* widening_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (uint32_t i = 0; i < values.size(); ++i) {
      const auto bits = static_cast<uint16_t>(i);
      values[i] = Type::is_bfloat16 ? widen_bfloat16(bits) : widen_float16(bits);
    }
    return values;
  }();
  return table.data();
}

// And all 256 of e4m3.
inline const float* e4m3_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(256);
    for (uint32_t code = 0; code < values.size(); ++code)
      values[code] = widen_float16(widen_e4m3(static_cast<uint8_t>(code)));
    return values;
  }();
  return table.data();
}

template <class Type>
float widen(uint16_t bits) {
  return widening_table<Type>()[bits];
}

template <class Type>
uint16_t narrow(float value) {
  return Type::is_bfloat16 ? narrow_bfloat16(value) : narrow_float16(value);
}

}  // namespace quire::emulator
