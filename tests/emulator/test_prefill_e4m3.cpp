// SPDX-License-Identifier: Apache-2.0
// Products of e4m3 by warpgroups, and the prefill kernel that is made of them.
#include <doctest/doctest.h>

#include <cmath>
#include <random>

#include "emulator/attention_suite.h"
#include "kernels/sm90/prefill_e4m3.h"

namespace quire::emulator {
namespace {

using device::pack_e4m3;
using device::part_bytes;
using device::shared_base;
using device::SharedAddress;
using device::thread_index;

float value_of(uint32_t code) { return e4m3_table()[code & 255]; }

TEST_CASE("codes from floats, and bytes apart") {
  CHECK(pack_e4m3(1, -2, 448, 1e9f) == 0x7E7EC038u);
  CHECK(pack_e4m3(0, 0.001953125f, 1.0625f, 1.1875f) == 0x3A380100u);  // ties to even
  uint32_t even, odd;
  part_bytes(0x03020100u, 0x07060504u, even, odd);
  CHECK(even == 0x06040200u);
  CHECK(odd == 0x07050301u);
}

// A product of 64 x depth x (8 kN8) codes. After every `flush` of k what has been summed goes to
// floats. `b` lies as [8 kN8][128] at a time.
template <int kN8>
struct Product8 {
  static constexpr int kN = 8 * kN8;
  int depth, flush;
  std::vector<uint8_t> a, b;  // [64][depth], [kN][depth]
  std::vector<float> d = std::vector<float>(64 * kN);

  Product8(int depth, int flush, uint32_t seed)
      : depth(depth), flush(flush), a(64 * depth), b(kN * depth) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (uint8_t& x : a) x = narrow_e4m3(std::fabs(normal(random)));  // as weights are
    for (uint8_t& x : b) x = narrow_e4m3(normal(random));
  }

  Report run(Options options, bool fences, bool waits) {
    return launch({1, 128, 32768}, options, [&] {
      const int t = thread_index(), row = t / 32 * 16 + t % 32 / 4;
      float sums[kN8][4], total[kN8][4] = {};
      for (int step = 0; step < depth; step += 32) {
        if (step % 128 == 0) {
          device::sync_block();
          for (uint32_t piece = 0; t < kN && piece < 8; ++piece) {
            uint32_t words[4];
            std::memcpy(words, &b[t * depth + step + 16 * piece], 16);
            device::st_shared(
                shared_base() + static_cast<uint32_t>(t * 128 + ((piece ^ t) & 7) * 16),
                device::U32x4{words[0], words[1], words[2], words[3]});
          }
          device::fence_proxy_async();
          device::sync_block();
        }
        uint32_t left[4];
        for (int r = 0; r < 4; ++r)
          std::memcpy(&left[r], &a[(row + r % 2 * 8) * depth + step + t % 4 * 4 + r / 2 * 16], 4);
        if (fences) device::wgmma_fence();
        device::wgmma_e4m3(
            sums, left,
            device::describe_matrix(shared_base() + static_cast<uint32_t>(step % 128), 16, 1024),
            step % flush > 0);
        device::wgmma_commit();
        if (waits) device::wgmma_wait<0>();
        if ((step + 32) % flush != 0) continue;
        for (int n = 0; n < kN8; ++n)
          for (int i = 0; i < 4; ++i) total[n][i] += sums[n][i];
      }
      for (int n = 0; n < kN8; ++n)
        for (int i = 0; i < 4; ++i)
          d[(row + i / 2 * 8) * kN + n * 8 + t % 4 * 2 + i % 2] = total[n][i];
    });
  }

  // Of the sums, the root of the mean square of error over that of the exact values.
  double error() const {
    double errors = 0, squares = 0;
    for (int i = 0; i < 64; ++i)
      for (int n = 0; n < kN; ++n) {
        double exact = 0;
        for (int k = 0; k < depth; ++k)
          exact += double{value_of(a[i * depth + k])} * value_of(b[n * depth + k]);
        errors += (d[i * kN + n] - exact) * (d[i * kN + n] - exact);
        squares += exact * exact;
      }
    return std::sqrt(errors / squares);
  }
};

TEST_CASE("products of codes") {
  uint32_t seed = 0;
  for (const AsyncMode async : {AsyncMode::kLazy, AsyncMode::kEager, AsyncMode::kRandom}) {
    const Options options{async, ++seed, true, {}};
    Product8<8> narrow(128, 64, seed);
    CHECK(narrow.run(options, true, true).error == "");
    CHECK(narrow.error() < 1e-3);
    Product8<16> wide(128, 64, seed);
    CHECK(wide.run(options, true, true).error == "");
    CHECK(wide.error() < 1e-3);
    CHECK(wide.run(options, false, true).error.find("no wgmma.fence") != std::string::npos);
    CHECK(!wide.run(options, true, false).ok());
  }
}

TEST_CASE("sums keep 14 bits of their fraction: what two levels of them save") {
  for (const int depth : {4096, 16384}) {
    Product8<8> one(depth, depth, 1), two(depth, 64, 1);
    CHECK(one.run({}, true, true).error == "");
    CHECK(two.run({}, true, true).error == "");
    MESSAGE("depth " << depth << ": relative error " << one.error() << " in one accumulator, "
                     << two.error() << " with floats every 64");
    CHECK(two.error() < 5e-4);
    CHECK(one.error() > 4 * two.error());
  }
}

// --- The kernel ----------------------------------------------------------------------------------

using device::Mode;

template <int kHeadDim = 128, Mode kMode = Mode::kFast>
AttentionKernel kernel() {
  using Traits = device::Sm90E4m3Traits<device::BFloat16, kHeadDim, 128, 128, 4, kMode>;
  return bind<Traits>(device::prefill_e4m3_sm90<Traits>);
}

AttentionCase base(int head_dim = 128) {
  AttentionCase c;
  c.head_dim = c.head_dim_v = head_dim;
  c.codes = Codes::kTensor;
  c.code_queries = true;
  return c;
}

TEST_CASE("plain and causal") {
  check_plain(kernel(), base());
  check_plain(kernel<64>(), base(64));
}

TEST_CASE("every option") {
  check_options(kernel<128, Mode::kFull>(), base());
  AttentionCase c = base(64);
  c.codes = Codes::kToken;
  check_options(kernel<64, Mode::kFull>(), c);
}

TEST_CASE("every kind of scale") {
  check_codes(kernel(), base());
  AttentionCase c = base(64);
  c.softcap = 3;
  c.alibi = true;
  check_codes(kernel<64, Mode::kFull>(), c);
}

TEST_CASE("chunks of keys") {
  check_chunks(kernel(), base());
  AttentionCase c = base();
  c.num_heads = c.num_kv_heads = 1;
  c.codes = Codes::kToken;
  c.softcap = 3;
  check_chunks(kernel<128, Mode::kFull>(), c);
}

TEST_CASE("negative scales, of queries or of keys") {
  for (const Codes codes : {Codes::kTensor, Codes::kToken}) {
    AttentionCase c = base();
    c.batch = {{5, 40}, {3, 600}};
    c.codes = codes;
    for (const float sign : {1.0f, -1.0f}) {
      AttentionProblem problem(c, true, kernel().rows);
      problem.params.scale *= -1;
      problem.params.k_scale.value *= sign;
      REQUIRE(run_attention(kernel<128, Mode::kFull>(), problem, {}).error == "");
      CHECK(compare_with_reference(problem) == "");
    }
  }
}

TEST_CASE("blocks of every size: by boxes where they have eight rows") {
  AttentionCase c = base();
  c.batch = {{70, 333}, {3, 700}};
  uint32_t seed = 0;
  for (const int block_size : {1, 4, 8, 16, 24, 128, 33}) {
    c.block_size = block_size;
    c.codes = seed % 2 == 0 ? Codes::kToken : Codes::kTensor;
    c.cache = seed % 3 == 0 ? Cache::kNhd : Cache::kHnd;
    const Report report = check_case(kernel(), c, static_cast<AsyncMode>(seed % 3), seed);
    CHECK((report.boxes > 0) == (block_size % 8 == 0));
    ++seed;
  }
}

TEST_CASE("more items without keys than the queue holds, after one that was gathered") {
  AttentionCase c = base();
  c.batch.assign(12, {2, 0});
  c.batch.push_back({3, 20});
  c.batch.insert(c.batch.end(), 6, {1, 0});
  for (const AsyncMode async : {AsyncMode::kLazy, AsyncMode::kEager, AsyncMode::kRandom})
    check_case(kernel(), c, async);
}

TEST_CASE("bits do not depend on how the work is cut") {
  AttentionCase c = base();
  c.codes = Codes::kToken;
  c.batch = {{5, 1300}, {1, 530}, {80, 700}};
  check_bits(kernel(), c);
  c.num_heads = c.num_kv_heads = 1;
  c.batch = {{5, 1100}};
  c.alibi = true;
  check_bits(kernel<128, Mode::kFull>(), c);
  c = base(64);
  c.num_heads = c.num_kv_heads = 1;
  c.batch = {{5, 1100}};
  check_bits(kernel<64>(), c);
}

}  // namespace
}  // namespace quire::emulator
