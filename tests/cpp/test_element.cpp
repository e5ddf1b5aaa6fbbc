// SPDX-License-Identifier: Apache-2.0
// Conversions of 16-bit elements, over every value: a half is a float, and a float becomes the
// nearest of the two halves around it, the even one of two that are equally near.
#include "cpu/element.h"

#include <doctest/doctest.h>

#include <cmath>
#include <initializer_list>
#include <limits>

using quire::cpu::BFloat16;
using quire::cpu::Float16;
using quire::cpu::from_float;
using quire::cpu::to_float;

namespace {

// What the bits mean, spelled out.
double value_of(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return fraction ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  const double significand = std::ldexp(fraction, -fraction_bits) + (exponent ? 1 : 0);
  return sign * std::ldexp(significand, (exponent ? exponent : 1) - bias);
}

template <class T>
uint16_t rounded(float x) {
  T result;
  from_float(x, result);
  return result.bits;
}

// Checks of all 65536 values, and of the floats at and on both sides of each point halfway between
// two neighbours: as rounding is monotonic, no other float can go wrong.
template <class T>
void check_all_values(int exponent_bits) {
  const uint16_t infinity = static_cast<uint16_t>(0x7fff << (15 - exponent_bits) & 0x7fff);
  for (int bits = 0; bits < 0x8000; ++bits) {
    const double value = value_of(static_cast<uint16_t>(bits), exponent_bits);
    for (const int sign : {0, 0x8000}) {
      const T element{static_cast<uint16_t>(bits | sign)};
      const float x = to_float(element);
      if (std::isnan(value)) {
        REQUIRE(std::isnan(x));
        const uint16_t again = rounded<T>(x);
        REQUIRE((again & 0x7fff) > infinity);
        continue;
      }
      REQUIRE(static_cast<double>(x) == (sign ? -value : value));
      REQUIRE(std::signbit(x) == (sign != 0));
      REQUIRE(rounded<T>(x) == element.bits);
      if (bits == infinity) continue;
      // The largest finite value has its upper neighbour where infinity would be, were it a number.
      const int next = bits + 1;
      const double above =
          next == infinity ? 2 * value - value_of(static_cast<uint16_t>(bits - 1), exponent_bits)
                           : value_of(static_cast<uint16_t>(next), exponent_bits);
      const float middle = static_cast<float>((value + above) / 2);
      REQUIRE(static_cast<double>(middle) == (value + above) / 2);
      const float factor = sign ? -1.0f : 1.0f;
      const auto want = [&](int magnitude) { return static_cast<uint16_t>(magnitude | sign); };
      REQUIRE(rounded<T>(factor * std::nextafter(middle, 0.0f)) == want(bits));
      REQUIRE(rounded<T>(factor * middle) == want(bits % 2 ? next : bits));
      REQUIRE(rounded<T>(factor * std::nextafter(middle, std::numeric_limits<float>::infinity())) ==
              want(next));
    }
  }
}

}  // namespace

TEST_CASE("float16") { check_all_values<Float16>(5); }

TEST_CASE("bfloat16") { check_all_values<BFloat16>(8); }

TEST_CASE("far beyond the range and NaN") {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float x : {65536.0f, 1e30f, std::numeric_limits<float>::max(), infinity}) {
    CHECK(rounded<Float16>(x) == 0x7c00);
    CHECK(rounded<Float16>(-x) == 0xfc00);
  }
  for (const float x : {1e-10f, std::numeric_limits<float>::denorm_min()}) {
    CHECK(rounded<Float16>(x) == 0);
    CHECK(rounded<Float16>(-x) == 0x8000);
  }
  for (const uint32_t bits : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffc00000u}) {
    const float nan = std::bit_cast<float>(bits);
    CHECK((rounded<Float16>(nan) & 0x7fff) > 0x7c00);
    CHECK((rounded<BFloat16>(nan) & 0x7fff) > 0x7f80);
  }
}
