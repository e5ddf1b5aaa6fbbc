// SPDX-License-Identifier: Apache-2.0
// The decode kernel over latent caches of compute capability 9.0a: by boxes of every height and by
// gathering, rows of one query and of several, whole sequences and pieces of them.
#include <doctest/doctest.h>

#include <cmath>

#include "emulator/attention_suite.h"
#include "kernels/sm90/mla_decode.h"

namespace quire::emulator {
namespace {

using device::BFloat16;
using device::Float16;
using device::Mode;

template <class Type, Mode kMode>
AttentionKernel kernel() {
  using Traits = device::Sm90MlaTraits<Type, 576, 64, 32, 4, kMode>;
  return bind<Traits>(device::mla_decode_sm90<Traits>);
}

AttentionCase base() {
  AttentionCase c;
  c.head_dim = 576, c.head_dim_v = 512;
  c.num_heads = 64, c.num_kv_heads = 1;
  c.is_latent = true;
  return c;
}

TEST_CASE("plain and causal") {
  AttentionCase c = base();
  c.num_heads = 4;
  check_plain(kernel<BFloat16, Mode::kFast>(), c);
}

TEST_CASE("a token or a few, blocks of any size") {
  AttentionCase c = base();
  const AttentionKernel k = kernel<BFloat16, Mode::kFast>();
  for (const int block_size : {1, 7, 8, 16, 24, 64})
    for (const int heads : {64, 128}) {
      c.block_size = block_size, c.num_heads = heads;
      c.batch = {{1, 77}, {1, 1}, {2, 40}, {1, 0}, {1, 64}};
      const auto seed = static_cast<uint32_t>(block_size + heads / 64);
      check_case(k, c, static_cast<AsyncMode>(seed % 3), seed);
      AttentionProblem problem(c, true, k.rows);
      CHECK((run_attention(k, problem, {}).boxes > 0) == (block_size % 8 == 0));
    }
}

TEST_CASE("rows that fill no tile, or see other keys than the tiles beside them") {
  AttentionCase c = base();
  for (const int heads : {16, 40, 100}) {
    c.num_heads = heads;
    c.batch = {{5, 70}, {heads == 16 ? 9 : 1, 530}, {1, 33}};
    check_case(kernel<Float16, Mode::kFast>(), c, AsyncMode::kRandom, static_cast<uint32_t>(heads));
  }
  c.num_heads = 16;
  c.window_left = 40;
  check_case(kernel<Float16, Mode::kFast>(), c);
}

TEST_CASE("every option") {
  AttentionCase c = base();
  c.num_heads = 4;
  check_options(kernel<Float16, Mode::kFull>(), c);
  c.num_heads = 65;
  c.batch = {{9, 60}, {1, 530}};
  c.softcap = 3, c.alibi = c.sinks = c.mask = c.mask_is_tree = true;
  c.cache = Cache::kOdd;
  check_case(kernel<BFloat16, Mode::kFull>(), c);
}

TEST_CASE("chunks of keys") {
  AttentionCase c = base();
  c.num_heads = 20;
  check_chunks(kernel<Float16, Mode::kFast>(), c);
}

TEST_CASE("bits do not depend on how the work is cut") {
  AttentionCase c = base();
  c.num_heads = 80;
  c.batch = {{2, 1100}, {1, 530}};
  check_bits(kernel<BFloat16, Mode::kFast>(), c);
}

TEST_CASE("blocks have places of their own for what they work on in global memory") {
  const AttentionKernel k = kernel<Float16, Mode::kFast>();
  AttentionCase c = base();
  c.num_heads = 128;
  c.batch = {{1, 40}, {1, 600}, {1, 1}};
  AttentionProblem problem(c, false, k.rows);
  REQUIRE(problem.plan.num_partials == 0);
  const int blocks = 2 * static_cast<int>(problem.plan.items.size());
  REQUIRE(run_attention(k, problem, {}, blocks).error == "");
  REQUIRE(problem.workspace.totals.size() == static_cast<size_t>(blocks) * k.global_bytes / 4);
  for (const float value : problem.workspace.totals) REQUIRE(!std::isnan(value));
}

TEST_CASE("more units without keys than the queue holds, after one that was gathered") {
  AttentionCase c = base();
  c.batch.assign(12, {1, 0});
  c.batch.push_back({3, 20});
  for (const AsyncMode async : {AsyncMode::kLazy, AsyncMode::kEager, AsyncMode::kRandom})
    check_case(kernel<Float16, Mode::kFast>(), c, async);
}

}  // namespace
}  // namespace quire::emulator
