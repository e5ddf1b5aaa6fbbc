// SPDX-License-Identifier: Apache-2.0
// The primitives of compute capability 9.0a on the emulator: what they do, and that what is wrong
// with their use is seen.
#include <doctest/doctest.h>

#include <random>
#include <string>
#include <vector>

#include "emulator/launch.h"
#include "prim/math.h"
#include "prim/sm90.h"

namespace quire::device {
namespace {

using emulator::AsyncMode;
using emulator::Options;
using emulator::Report;

constexpr AsyncMode kModes[] = {AsyncMode::kLazy, AsyncMode::kEager, AsyncMode::kRandom};

bool says(const Report& report, const char* text) {
  return report.error.find(text) != std::string::npos;
}

// --- Boxes
// -----------------------------------------------------------------------------------------

// A tensor [5 outer, 20 rows, 3 heads, 72 columns] and a map of boxes of 8 rows.
struct Tensor {
  static constexpr int kColumns = 72, kHeads = 3, kRows = 20, kOuter = 5;
  std::vector<uint16_t> values;
  TensorMap map;

  Tensor() : values(kColumns * kHeads * kRows * kOuter) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i * 7 + 1);
    const uint64_t dims[] = {kColumns, kRows, kHeads, kOuter};
    const uint64_t strides[] = {2 * kColumns * kHeads, 2 * kColumns, 2 * kColumns * kHeads * kRows};
    const uint32_t box[] = {64, 8, 1, 1};
    REQUIRE(emulator::encode_tensor_map(&map, values.data(), dims, strides, box));
  }
  uint16_t at(int outer, int row, int head, int column) const {
    if (column >= kColumns || row >= kRows) return 0;
    return values[((outer * kRows + row) * kHeads + head) * kColumns + column];
  }
};

struct BoxPlant {
  bool expect = true, fence = true, wait = true;
  int bytes = 1024;
  uint32_t parity = 0;
};

// One thread brings a box of rows 16.. and columns 64.. of head 1, outer 2; all read it.
Report bring_box(const Tensor& tensor, Options options, BoxPlant plant,
                 std::vector<uint16_t>& seen) {
  seen.assign(8 * 64, 0xABCD);
  return emulator::launch({1, 64, 2048}, options, [&] {
    const SharedAddress barrier = shared_base() + 1024;
    if (thread_index() == 0) {
      mbarrier_init(barrier, 1);
      if (plant.fence) fence_mbarrier_init();
    }
    sync_block();
    if (thread_index() == 0) {
      if (plant.expect)
        mbarrier_arrive_expect(barrier, plant.bytes);
      else
        mbarrier_arrive(barrier);
      copy_box(shared_base(), &tensor.map, barrier, 64, 16, 1, 2);
    }
    if (plant.wait) mbarrier_wait(barrier, plant.parity);
    const auto row = static_cast<uint32_t>(thread_index() / 8), piece = thread_index() % 8u;
    const auto words = ld_shared<U32x4>(shared_base() + row * 128 + ((piece ^ row) << 4));
    const uint32_t list[] = {words.x, words.y, words.z, words.w};
    for (int e = 0; e < 8; ++e)
      seen[row * 64 + piece * 8 + e] = static_cast<uint16_t>(list[e / 2] >> (e % 2 * 16));
  });
}

TEST_CASE("a box of a tensor, swizzled, zeros around the tensor") {
  const Tensor tensor;
  std::vector<uint16_t> seen;
  for (const AsyncMode async : kModes)
    for (uint32_t seed = 1; seed <= 5; ++seed) {
      const Report report = bring_box(tensor, {async, seed, true, {}}, {}, seen);
      REQUIRE(report.error == "");
      for (int row = 0; row < 8; ++row)
        for (int column = 0; column < 64; ++column)
          if (seen[row * 64 + column] != tensor.at(2, 16 + row, 1, 64 + column))
            FAIL("row " << row << " column " << column);
    }
}

TEST_CASE("bulk copies that are not waited for as they must") {
  const Tensor tensor;
  std::vector<uint16_t> seen;
  for (const AsyncMode async : kModes)
    for (uint32_t seed = 1; seed <= 5; ++seed) {
      const auto run = [&](BoxPlant plant) {
        return bring_box(tensor, {async, seed, true, {}}, plant, seen);
      };
      BoxPlant plant;
      plant.wait = false;
      CHECK(!run(plant).ok());
      plant = {};
      plant.parity = 1;  // complete from the beginning
      CHECK(!run(plant).ok());
      plant = {};
      plant.bytes = 1040;
      CHECK(says(run(plant), "deadlock"));
      plant = {};
      plant.fence = false;
      CHECK(says(run(plant), "not fenced"));
      plant = {};
      plant.expect = false;
      if (async == AsyncMode::kLazy) CHECK(!run(plant).ok());
    }
}

TEST_CASE("mbarriers order what is before an arrival and after a wait") {
  for (const bool arrives_late : {false, true})
    for (uint32_t seed = 1; seed <= 5; ++seed) {
      const Report report = emulator::launch({1, 64, 64}, {AsyncMode::kLazy, seed, true, {}}, [&] {
        const SharedAddress full = shared_base() + 8, empty = shared_base() + 16;
        if (thread_index() == 0) {
          mbarrier_init(full, 1);
          mbarrier_init(empty, 1);
        }
        sync_block();
        for (uint32_t i = 0; i < 4; ++i) {
          if (thread_index() == 0) {
            mbarrier_wait(empty, (i & 1) ^ 1);
            if (arrives_late) mbarrier_arrive(full);
            st_shared<uint32_t>(shared_base(), i);
            if (!arrives_late) mbarrier_arrive(full);
          } else if (thread_index() == 32) {
            mbarrier_wait(full, i & 1);
            ld_shared<uint32_t>(shared_base());
            mbarrier_arrive(empty);
          }
        }
      });
      CHECK(report.ok() != arrives_late);
    }
}

TEST_CASE("named barriers order their threads, and no others") {
  for (const bool takes_part : {true, false})
    for (uint32_t seed = 1; seed <= 5; ++seed) {
      const Report report = emulator::launch({1, 96, 64}, {AsyncMode::kLazy, seed, true, {}}, [&] {
        const int warp = thread_index() / kWarpSize;
        if (thread_index() == 0) st_shared<uint32_t>(shared_base(), 1);
        if (warp < 2) sync_threads<64>(1);
        if (thread_index() == (takes_part ? 32 : 64)) ld_shared<uint32_t>(shared_base());
      });
      CHECK(report.ok() == takes_part);
    }
}

TEST_CASE("registers that warpgroups ask for are there") {
  const auto run = [](auto increase) {
    return emulator::launch({1, 384, 16}, {}, [&] {
      if (thread_index() < 256)
        increase();
      else
        decrease_registers<40>();
    });
  };
  CHECK(run([] { increase_registers<232>(); }).error == "");
  CHECK(says(run([] { increase_registers<240>(); }), "more registers"));
  CHECK(says(run([] { increase_registers<160>(); }), "inc to fewer registers"));
  CHECK(says(run([] { decrease_registers<176>(); }), "dec to more registers"));
}

// --- Products
// --------------------------------------------------------------------------------------

struct ProductPlant {
  bool proxy_fence = true, fence = true, wait = true;
  uint32_t stride = 1024, leading = 8192;  // of the right operand
};

// d[64][8 kN8] = a b + a b over two steps of k, from shared memory or registers; `b` lies as kMajor
// says, [8 kN8][64] or [32][8 kN8].
template <class Type, Major kMajor, bool kFromRegisters, int kN8>
struct ProductCase {
  static constexpr int kN = 8 * kN8;
  uint16_t a[64][32], b[32][kN];
  float d[64][kN];

  explicit ProductCase(uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (auto& row : a)
      for (auto& x : row) x = emulator::narrow<Type>(normal(random));
    for (auto& row : b)
      for (auto& x : row) x = emulator::narrow<Type>(normal(random));
  }

  // Stores element by element; eight rows of 128 bytes are swizzled together.
  static void store(SharedAddress tile, uint32_t row, uint32_t column, uint16_t value) {
    const uint32_t piece = column / 8 ^ (row & 7);
    st_shared(tile + row * 128 + piece * 16 + column % 8 * 2, value);
  }

  Report run(Options options, ProductPlant plant) {
    constexpr uint32_t kLeft = 0, kRight = 8192;
    return emulator::launch({1, 128, 40960}, options, [&] {
      const uint32_t t = thread_index();
      for (uint32_t k = 0; k < 32 && t < 64; ++k) store(shared_base() + kLeft, t, k, a[t][k]);
      for (uint32_t k = 0; k < 32; ++k)
        for (uint32_t n = 0; n < kN; ++n)
          if (kMajor == Major::kK && t == n)
            store(shared_base() + kRight, n, k, b[k][n]);
          else if (kMajor == Major::kN && t == k)
            store(shared_base() + kRight + n / 64 * 8192, k, n % 64, b[k][n]);
      if (plant.proxy_fence) fence_proxy_async();
      sync_block();
      float sums[kN8][4];
      if (plant.fence) wgmma_fence();
      for (uint32_t step = 0; step < 2; ++step) {
        const MatrixDescriptor right =
            describe_matrix(shared_base() + kRight + step * (kMajor == Major::kK ? 32u : 2048u),
                            plant.leading, plant.stride);
        if constexpr (kFromRegisters) {
          uint32_t left[4];
          for (uint32_t r = 0; r < 4; ++r) {
            const uint32_t row = t / 32 * 16 + t % 32 / 4 + r % 2 * 8;
            const uint32_t k = step * 16 + t % 4 * 2 + r / 2 * 8;
            left[r] = a[row][k] | uint32_t{a[row][k + 1]} << 16;
          }
          wgmma<Type, kMajor>(sums, left, right, step > 0);
        } else {
          wgmma<Type, kMajor>(sums, describe_matrix(shared_base() + kLeft + 32 * step, 16, 1024),
                              right, step > 0);
        }
      }
      wgmma_commit();
      if (plant.wait) wgmma_wait<0>();
      for (int n = 0; n < kN8; ++n)
        for (uint32_t i = 0; i < 4; ++i)
          d[t / 32 * 16 + t % 32 / 4 + i / 2 * 8][n * 8 + t % 4 * 2 + i % 2] = sums[n][i];
    });
  }

  bool is_right() const {
    for (int i = 0; i < 64; ++i)
      for (int n = 0; n < kN; ++n) {
        double exact = 0;
        for (int k = 0; k < 32; ++k)
          exact += double{emulator::widen<Type>(a[i][k])} * emulator::widen<Type>(b[k][n]);
        if (!(std::fabs(d[i][n] - exact) < 1e-4)) return false;
      }
    return true;
  }
};

template <class Case>
void check_product(bool uses_leading) {
  uint32_t seed = 0;
  for (const AsyncMode async : kModes)
    for (int i = 0; i < 2; ++i) {
      Case product(++seed);
      const Options options{async, seed, true, {}};
      CHECK(product.run(options, {}).error == "");
      CHECK(product.is_right());
      ProductPlant plant;
      plant.proxy_fence = false;
      CHECK(says(product.run(options, plant), "without fence.proxy.async"));
      plant = {};
      plant.fence = false;
      CHECK(says(product.run(options, plant), "no wgmma.fence"));
      plant = {};
      plant.wait = false;
      CHECK(says(product.run(options, plant), "products in flight"));
      plant = {};
      plant.stride = 2048;
      product.run(options, plant);
      CHECK(!product.is_right());
      plant = {};
      plant.leading = 4096;
      product.run(options, plant);
      CHECK(product.is_right() != uses_leading);
    }
}

TEST_CASE("products of warpgroups") {
  check_product<ProductCase<Float16, Major::kK, false, 16>>(false);
  check_product<ProductCase<BFloat16, Major::kK, false, 4>>(false);
  check_product<ProductCase<BFloat16, Major::kK, true, 8>>(false);
  check_product<ProductCase<BFloat16, Major::kN, false, 8>>(false);
  check_product<ProductCase<Float16, Major::kN, true, 16>>(true);
}

TEST_CASE("an operand that is overwritten before the wait") {
  for (const AsyncMode async : kModes) {
    const Report report = emulator::launch({1, 128, 16384}, {async, 3, true, {}}, [] {
      if (thread_index() < 32)
        for (uint32_t i = thread_index() * 16u; i < 16384; i += 512)
          st_shared(shared_base() + i, U32x4{});
      fence_proxy_async();
      sync_block();
      float sums[8][4];
      wgmma_fence();
      wgmma<Float16, Major::kK>(sums, describe_matrix(shared_base(), 16, 1024),
                                describe_matrix(shared_base() + 8192, 16, 1024), false);
      wgmma_commit();
      sync_block();
      if (thread_index() == 5) st_shared<uint32_t>(shared_base() + 8192, 1);
      wgmma_wait<0>();
    });
    CHECK(!report.ok());
  }
}

}  // namespace
}  // namespace quire::device
