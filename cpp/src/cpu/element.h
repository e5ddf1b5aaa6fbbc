// SPDX-License-Identifier: Apache-2.0
// Elements narrower than a float in portable C++. Kernels convert whole vectors (simd_*.h); this is
// for single elements, and for the tier that has no vector instructions to rely on. No conversion
// of 16 bits branches, so that a compiler can make vectors of a loop over elements.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace quire::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Elements of quantised caches. Writing bounds by the largest finite one; NaN stays NaN.
struct Float8E4M3 {  // sign, 4 bits of exponent, 3 of fraction; all ones is NaN, nothing infinite
  uint8_t bits;
  static constexpr float kLargest = 448;
};
struct Float8E5M2 {  // the upper half of a Float16
  uint8_t bits;
  static constexpr float kLargest = 57344;
};
struct Int8 {  // -127 ... 127; NaN becomes 0
  int8_t value;
  static constexpr float kLargest = 127;
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

// A float of 1 + exponent + kFraction bits, finite: nothing here makes or takes a subnormal float,
// which would be slow, and 0 to a thread that flushes them.
template <int kFraction, int kBias>
inline float widen_float8(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7f;
  const float subnormal =
      static_cast<float>(magnitude) * std::bit_cast<float>(uint32_t{128 - kBias - kFraction} << 23);
  const float normal =
      std::bit_cast<float>((magnitude << (23 - kFraction)) + (uint32_t{127 - kBias} << 23));
  const float value = magnitude >> kFraction ? normal : subnormal;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | (bits & 0x80) << 24);
}

inline float to_float(Float8E4M3 x) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  return (x.bits & 0x7f) == 0x7f ? kNaN : widen_float8<3, 7>(x.bits);
}

inline float to_float(Float8E5M2 x) {
  if ((x.bits & 0x7c) == 0x7c)  // infinity, NaN
    return std::bit_cast<float>((x.bits & 0x80u) << 24 | 0x7f800000u | (x.bits & 3u) << 21);
  return widen_float8<2, 15>(x.bits);
}

inline float to_float(Int8 x) { return x.value; }

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

// Rounds to nearest even and bounds. Integers stand in for comparisons of floats, and nothing
// branches, so that loops are vectorised.
template <int kFraction, int kBias>
inline uint8_t narrow_float8(float x, float largest, int32_t nan) {
  constexpr int kDropped = 23 - kFraction;
  // Adding this leaves a float's last bit with the value of a subnormal's, where it rounds.
  constexpr int32_t kShifter = (151 - kBias - kFraction) << 23;
  const int32_t all = std::bit_cast<int32_t>(x), magnitude = all & 0x7fffffff;
  const int32_t top = std::bit_cast<int32_t>(largest);
  const int32_t bits = magnitude < top ? magnitude : top;
  const int32_t half = (1 << (kDropped - 1)) - 1 + (bits >> kDropped & 1);
  const int32_t normal = (bits - ((127 - kBias) << 23) + half) >> kDropped;
  const float shifted = std::bit_cast<float>(bits) + std::bit_cast<float>(kShifter);
  const int32_t subnormal = std::bit_cast<int32_t>(shifted) - kShifter;
  const int32_t finite = select(bits >= (128 - kBias) << 23, normal, subnormal);
  const int32_t result = select(magnitude > 0x7f800000, nan, finite);
  return static_cast<uint8_t>((all >> 24 & 0x80) | result);
}

inline void from_float(float x, Float8E4M3& out) {
  out.bits = narrow_float8<3, 7>(x, Float8E4M3::kLargest, 0x7f);
}

inline void from_float(float x, Float8E5M2& out) {
  out.bits = narrow_float8<2, 15>(x, Float8E5M2::kLargest, 0x7e);
}

inline void from_float(float x, Int8& out) {
  constexpr float kShifter = 0x1.8p23f;  // leaves no room for a fraction
  const int32_t all = std::bit_cast<int32_t>(x), magnitude = all & 0x7fffffff;
  const int32_t top = std::bit_cast<int32_t>(Int8::kLargest);
  const int32_t bounded = magnitude < top ? magnitude : top;
  const int32_t finite = magnitude > 0x7f800000 ? 0 : bounded;
  const float value = std::bit_cast<float>(finite | (all & ~0x7fffffff));
  out.value = static_cast<int8_t>(std::bit_cast<int32_t>(value + kShifter) & 0xff);
}

}  // namespace quire::cpu
