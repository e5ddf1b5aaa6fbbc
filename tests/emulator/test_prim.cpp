// SPDX-License-Identifier: Apache-2.0
// The host side of the primitives: layouts of fragments as the PTX manual gives them, rounding,
// and bank conflicts.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "emulator/launch.h"
#include "prim/math.h"
#include "prim/sm80.h"

namespace quire::device {
namespace {

using emulator::Report;

TEST_CASE_TEMPLATE("narrowing rounds to nearest even", Type, Float16, BFloat16) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const float value = emulator::widen<Type>(bits);
    if (std::isnan(value)) {
      CHECK(std::isnan(emulator::widen<Type>(emulator::narrow<Type>(value))));
      continue;
    }
    if (emulator::narrow<Type>(value) != bits) FAIL("round trip of " << i);
    const float next = emulator::widen<Type>(static_cast<uint16_t>(i + 1));
    if (!std::isfinite(value) || !std::isfinite(next) || (i & 0x7FFF) == 0x7FFF) continue;
    const float middle = value / 2 + next / 2;  // exact: a float has bits to spare
    const uint16_t even = i % 2 ? i + 1 : i;
    if (std::fabs(next) > std::fabs(value) && middle != 0) {
      if (emulator::narrow<Type>(middle) != even) FAIL("tie after " << i);
      if (emulator::narrow<Type>(std::nextafter(middle, next)) != i + 1) FAIL("above tie " << i);
      if (emulator::narrow<Type>(std::nextafter(middle, value)) != i) FAIL("below tie " << i);
    }
  }
  CHECK(emulator::widen<Type>(emulator::narrow<Type>(3.4e38f)) > 1e38f);
}

// One warp; lane l's result of `kernel` is element l.
template <class T, class Kernel>
std::vector<T> of_each_lane(int shared_bytes, Report& report, Kernel kernel) {
  std::vector<T> results(kWarpSize);
  report = emulator::launch({1, kWarpSize, shared_bytes}, {},
                            [&] { results[thread_index()] = kernel(thread_index()); });
  CHECK(report.error == "");
  return results;
}

TEST_CASE("shuffles") {
  Report report;
  const auto swapped = of_each_lane<float>(
      4, report, [](int lane) { return shuffle_xor(static_cast<float>(lane), 6); });
  const auto picked =
      of_each_lane<int>(4, report, [](int lane) { return shuffle(lane * 10, lane / 2); });
  for (int lane = 0; lane < kWarpSize; ++lane) {
    CHECK(swapped[lane] == static_cast<float>(lane ^ 6));
    CHECK(picked[lane] == lane / 2 * 10);
  }
}

struct Fragment {
  uint32_t registers[4];
};

// Four matrices whose element (j, row, column) is 64j + 8 row + column.
template <Transposed kTransposed, int kCount>
std::vector<Fragment> load_matrices(Report& report, uint32_t pitch) {
  return of_each_lane<Fragment>(32 * pitch + 16, report, [=](int lane) {
    const SharedAddress row = shared_base() + lane * pitch;
    for (int i = 0; i < 4; ++i)
      st_shared<uint32_t>(row + 4 * i, (8 * lane + 2 * i) | (8 * lane + 2 * i + 1) << 16);
    sync_warp();
    uint32_t registers[kCount];
    ldmatrix<kTransposed>(registers, row);
    Fragment fragment{};
    for (int j = 0; j < kCount; ++j) fragment.registers[j] = registers[j];
    return fragment;
  });
}

template <int kCount>
void check_ldmatrix() {
  Report report;
  const auto rows = load_matrices<Transposed::kNo, kCount>(report, 16);
  const auto columns = load_matrices<Transposed::kYes, kCount>(report, 16);
  for (uint32_t lane = 0; lane < 32; ++lane)
    for (uint32_t j = 0; j < kCount; ++j) {
      const uint32_t g = lane / 4, t = lane % 4 * 2;
      CHECK(rows[lane].registers[j] == ((64 * j + 8 * g + t) | (64 * j + 8 * g + t + 1) << 16));
      CHECK(columns[lane].registers[j] ==
            ((64 * j + 8 * t + g) | (64 * j + 8 * (t + 1) + g) << 16));
    }
}

TEST_CASE("ldmatrix") {
  check_ldmatrix<1>();
  check_ldmatrix<2>();
  check_ldmatrix<4>();
}

TEST_CASE("ldmatrix counts bank conflicts") {
  Report report;
  load_matrices<Transposed::kNo, 4>(report, 16);
  CHECK(report.ldmatrix == 4);
  CHECK(report.ldmatrix_conflicts == 0);
  load_matrices<Transposed::kNo, 4>(report, 128);  // all rows in the same banks
  CHECK(report.ldmatrix_conflicts == 4 * 7);
  load_matrices<Transposed::kNo, 4>(report, 144);
  CHECK(report.ldmatrix_conflicts == 0);
}

TEST_CASE_TEMPLATE("mma multiplies", Type, Float16, BFloat16) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  uint16_t a[16][16], b[16][8];
  float c[16][8];
  for (auto& row : a)
    for (auto& x : row) x = emulator::narrow<Type>(normal(random));
  for (auto& row : b)
    for (auto& x : row) x = emulator::narrow<Type>(normal(random));
  for (auto& row : c)
    for (auto& x : row) x = normal(random);
  const auto pair = [](uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; };
  struct Sums {
    float c[4];
  };
  Report report;
  const auto sums = of_each_lane<Sums>(4, report, [&](int lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    const uint32_t fragment[4] = {pair(a[g][t], a[g][t + 1]), pair(a[g + 8][t], a[g + 8][t + 1]),
                                  pair(a[g][t + 8], a[g][t + 9]),
                                  pair(a[g + 8][t + 8], a[g + 8][t + 9])};
    Sums s{{c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]}};
    mma<Type>(s.c, fragment, pair(b[t][g], b[t + 1][g]), pair(b[t + 8][g], b[t + 9][g]));
    return s;
  });
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      double exact = c[i][j];
      for (int k = 0; k < 16; ++k)
        exact += double{emulator::widen<Type>(a[i][k])} * emulator::widen<Type>(b[k][j]);
      CHECK(sums[i % 8 * 4 + j / 2].c[i / 8 * 2 + j % 2] == doctest::Approx(exact).epsilon(1e-5));
    }
}

TEST_CASE("arithmetic at the edges that kernels rely on") {
  CHECK(exp2(0.0f) == 1.0f);
  CHECK(exp2(-kInfinity) == 0.0f);
  CHECK(log2(0.0f) == -kInfinity);
  CHECK(max(std::numeric_limits<float>::quiet_NaN(), 1.0f) == 1.0f);
  CHECK(pack<Float16>(1.0f, -2.0f) == 0xC0003C00u);
  CHECK(widen<BFloat16>(0x3F80) == 1.0f);
  for (uint32_t code = 0; code < 256; ++code) {
    const int exponent = static_cast<int>(code >> 3 & 15), fraction = static_cast<int>(code & 7);
    const float magnitude =
        exponent ? std::ldexp(1 + fraction / 8.0f, exponent - 7) : std::ldexp(fraction / 8.0f, -6);
    uint32_t even, odd;
    widen_e4m3(code | 0x38u << 8 | 0x40u << 16 | code << 24, even, odd);  // 1 and 2 between
    const float first = widen<Float16>(static_cast<uint16_t>(even));
    CHECK(widen<Float16>(static_cast<uint16_t>(even >> 16)) == 2.0f);
    CHECK(widen<Float16>(static_cast<uint16_t>(odd)) == 1.0f);
    CHECK((odd >> 16) == (even & 0xFFFF));
    if ((code & 127) == 127)
      CHECK(std::isnan(first));
    else
      CHECK(first == (code & 128 ? -magnitude : magnitude));
  }
}

}  // namespace
}  // namespace quire::device
