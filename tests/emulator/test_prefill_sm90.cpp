// SPDX-License-Identifier: Apache-2.0
// The prefill kernel of compute capability 9.0a, and how it brings keys: by boxes of every height,
// and by gathering.
#include <doctest/doctest.h>

#include <cmath>

#include "emulator/attention_suite.h"
#include "kernels/sm90/prefill.h"

namespace quire::emulator {
namespace {

using device::BFloat16;
using device::Float16;
using device::Mode;

template <class Type, int kKeyDim, int kHeadDim, int kRows, int kKeys, int kStages, Mode kMode>
AttentionKernel kernel() {
  using Traits = device::Sm90PrefillTraits<Type, kKeyDim, kHeadDim, kRows, kKeys, kStages, kMode>;
  return bind<Traits>(device::prefill_sm90<Traits>);
}

AttentionCase base(int head_dim) {
  AttentionCase c;
  c.head_dim = c.head_dim_v = head_dim;
  return c;
}

TEST_CASE("plain and causal") {
  check_plain(kernel<Float16, 64, 64, 128, 128, 3, Mode::kFast>(), base(64));
  check_plain(kernel<BFloat16, 128, 128, 128, 128, 2, Mode::kFast>(), base(128));
}

TEST_CASE("exponentials by polynomial") {
  double worst = 0;
  for (double x = -126; x <= 0; x += 1.0 / 1024) {
    const auto given = static_cast<float>(x + 1e-4 * std::sin(x * 1e3));
    const double exact = std::exp2(static_cast<double>(given));
    worst = std::max(worst, std::fabs(device::exp2_by_polynomial(given) / exact - 1));
  }
  CHECK(worst < 3.1e-6);
  CHECK(device::exp2_by_polynomial(0) == 1);
  CHECK(device::exp2_by_polynomial(-7) == 1.0f / 128);
  CHECK(device::exp2_by_polynomial(-127) == 0);
  CHECK(device::exp2_by_polynomial(-1e30f) == 0);
  CHECK(device::exp2_by_polynomial(-INFINITY) == 0);
  CHECK(std::isnan(device::exp2_by_polynomial(NAN)));
}

TEST_CASE("every option") {
  check_options(kernel<Float16, 64, 64, 128, 128, 3, Mode::kFull>(), base(64));
  check_options(kernel<BFloat16, 128, 128, 128, 64, 4, Mode::kFull>(), base(128));
}

TEST_CASE("chunks of keys") {
  check_chunks(kernel<BFloat16, 128, 128, 128, 128, 2, Mode::kFast>(), base(128));
}

TEST_CASE("keys of another head dim than values") {
  AttentionCase c = base(192);
  c.head_dim_v = 128;
  check_plain(kernel<BFloat16, 192, 128, 128, 64, 2, Mode::kFast>(), c);
  check_options(kernel<Float16, 192, 128, 128, 64, 2, Mode::kFull>(), c);
  c.batch = {{5, 1300}, {80, 700}};
  check_bits(kernel<BFloat16, 192, 128, 128, 64, 2, Mode::kFast>(), c);
}

TEST_CASE("head dim 256: the total is in global memory") {
  const AttentionKernel fast = kernel<BFloat16, 256, 256, 128, 64, 2, Mode::kFast>();
  check_plain(fast, base(256));
  check_options(kernel<Float16, 256, 256, 128, 64, 2, Mode::kFull>(), base(256));
  check_chunks(fast, base(200));
  AttentionCase c = base(256);
  c.batch = {{5, 1300}, {80, 700}};
  check_bits(fast, c);
  c.num_heads = 260, c.num_kv_heads = 2;  // three tiles of rows an item
  c.batch = {{1, 1100}, {2, 530}};
  for (const int block_size : {16, 7}) {
    c.block_size = block_size;
    check_case(fast, c, AsyncMode::kRandom, static_cast<uint32_t>(block_size));
  }
}

TEST_CASE("blocks have places of their own for what they work on in global memory") {
  const AttentionKernel k = kernel<Float16, 256, 256, 128, 64, 2, Mode::kFast>();
  AttentionCase c = base(256);
  c.num_heads = c.num_kv_heads = 1;
  c.batch = {{3, 40}, {9, 20}, {130, 600}, {1, 1}};
  AttentionProblem problem(c, false, k.rows);
  const int blocks = static_cast<int>(problem.plan.items.size());
  REQUIRE(blocks > 3);
  REQUIRE(problem.plan.num_partials == 0);
  REQUIRE(run_attention(k, problem, {}, blocks).error == "");
  REQUIRE(problem.workspace.totals.size() == static_cast<size_t>(blocks) * k.global_bytes / 4);
  for (const float value : problem.workspace.totals) REQUIRE(!std::isnan(value));
}

TEST_CASE("boxes of every height, and block sizes that have none") {
  const AttentionKernel k = kernel<Float16, 64, 64, 128, 128, 3, Mode::kFast>();
  AttentionCase c = base(64);
  c.batch = {{70, 333}, {3, 700}};
  uint32_t seed = 0;
  for (const Cache cache : {Cache::kNhd, Cache::kHnd})
    for (const int block_size : {2, 4, 8, 16, 24, 32, 48, 128, 256, 33}) {
      c.block_size = block_size;
      c.cache = cache;
      const Report report = check_case(k, c, static_cast<AsyncMode>(seed % 3), seed);
      CHECK((report.boxes > 0) == (block_size % 8 == 0));
      ++seed;
    }
}

TEST_CASE("windows: blocks that no query sees are not read") {
  const AttentionKernel k = kernel<BFloat16, 128, 128, 128, 128, 2, Mode::kFast>();
  AttentionCase c = base(128);
  c.batch = {{70, 700}, {40, 1100}};
  for (const int left : {5, 200, 600}) {
    c.window_left = left;
    check_case(k, c, AsyncMode::kRandom, static_cast<uint32_t>(left));
  }
}

TEST_CASE("more items without keys than the queue holds, after one that was gathered") {
  AttentionCase c = base(64);
  c.batch.assign(12, {2, 0});
  c.batch.push_back({3, 20});
  for (const AsyncMode async : {AsyncMode::kLazy, AsyncMode::kEager, AsyncMode::kRandom})
    check_case(kernel<Float16, 64, 64, 128, 128, 3, Mode::kFast>(), c, async);
}

TEST_CASE("bits do not depend on how the work is cut") {
  AttentionCase c = base(64);
  c.batch = {{5, 1300}, {1, 530}, {80, 700}};
  check_bits(kernel<Float16, 64, 64, 128, 128, 3, Mode::kFast>(), c);
}

}  // namespace
}  // namespace quire::emulator
