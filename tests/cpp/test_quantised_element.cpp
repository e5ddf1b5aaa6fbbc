// SPDX-License-Identifier: Apache-2.0
// Elements of quantised caches: every code, and every boundary between two.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/element.h"

using namespace quire::cpu;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class T>
uint8_t code_of(float x) {
  T element;
  from_float(x, element);
  return std::bit_cast<uint8_t>(element);
}

template <class T>
float value_of(int code) {
  return to_float(std::bit_cast<T>(static_cast<uint8_t>(code)));
}

// Finite values in rising order with their codes; of the two zeros the positive one.
template <class T>
std::vector<std::pair<float, uint8_t>> finite_values() {
  std::vector<std::pair<float, uint8_t>> values;
  for (int code = 0; code < 256; ++code) {
    const float x = value_of<T>(code);
    if (std::abs(x) <= T::kLargest && !(x == 0 && std::signbit(x)))
      values.emplace_back(x, static_cast<uint8_t>(code));
  }
  std::sort(values.begin(), values.end());
  return values;
}

// A code rounds to itself; between two neighbours the middle goes to the even code, and what is
// off the middle by one bit of a float to the nearer one.
template <class T>
void check_rounding() {
  const auto values = finite_values<T>();
  CHECK(values.back().first == T::kLargest);
  CHECK(values.front().first == -T::kLargest);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto [x, code] = values[i];
    CHECK(code_of<T>(x) == code);
    if (i + 1 == values.size()) break;
    const auto [next, next_code] = values[i + 1];
    const float middle = x + (next - x) / 2;
    const float at_middle = value_of<T>(code_of<T>(middle));
    CHECK(at_middle == (code % 2 == 0 ? x : next));
    CHECK(value_of<T>(code_of<T>(std::nextafter(middle, -kInf))) == x);
    CHECK(value_of<T>(code_of<T>(std::nextafter(middle, kInf))) == next);
  }
  for (float x : {T::kLargest * 1.01f, 1e30f, kInf}) {
    CHECK(value_of<T>(code_of<T>(x)) == T::kLargest);
    CHECK(value_of<T>(code_of<T>(-x)) == -T::kLargest);
  }
}

}  // namespace

TEST_CASE("rounding to nearest even, bounded") {
  check_rounding<Float8E4M3>();
  check_rounding<Float8E5M2>();
  check_rounding<Int8>();
}

TEST_CASE("what codes stand for") {
  CHECK(value_of<Float8E4M3>(0x01) == 0x1p-9f);
  CHECK(value_of<Float8E4M3>(0x08) == 0x1p-6f);
  CHECK(value_of<Float8E4M3>(0xb9) == -1.125f);
  CHECK(std::isnan(value_of<Float8E4M3>(0x7f)));
  CHECK(std::isnan(value_of<Float8E4M3>(0xff)));
  CHECK(value_of<Float8E5M2>(0x01) == 0x1p-16f);
  CHECK(value_of<Float8E5M2>(0xbd) == -1.25f);
  CHECK(value_of<Float8E5M2>(0xfc) == -kInf);
  for (int code : {0x7d, 0x7e, 0xff}) CHECK(std::isnan(value_of<Float8E5M2>(code)));
  CHECK(value_of<Int8>(0x80) == -128);
}

TEST_CASE("zeros keep their sign, NaN stays NaN where there is one") {
  CHECK(code_of<Float8E4M3>(-0.0f) == 0x80);
  CHECK(code_of<Float8E5M2>(-1e-30f) == 0x80);
  CHECK(std::isnan(value_of<Float8E4M3>(code_of<Float8E4M3>(kNaN))));
  CHECK(std::isnan(value_of<Float8E5M2>(code_of<Float8E5M2>(-kNaN))));
  CHECK(code_of<Int8>(kNaN) == 0);
}
