// SPDX-License-Identifier: Apache-2.0
// The decode kernel over latent caches: tile shapes, types and modes.
#include <doctest/doctest.h>

#include "emulator/attention_suite.h"
#include "kernels/mla_decode.h"

namespace quire::emulator {
namespace {

using device::BFloat16;
using device::Float16;
using device::Mode;

template <class Type, int kRows, int kKeys, int kStages, Mode kMode>
AttentionKernel kernel() {
  using Traits = device::MlaTraits<Type, 576, kRows, kKeys, kStages, kMode>;
  return bind<Traits>(device::mla_decode<Traits>);
}

AttentionCase base() {
  AttentionCase c;
  c.head_dim = 576, c.head_dim_v = 512;
  c.num_heads = 4, c.num_kv_heads = 1;
  c.is_latent = true;
  return c;
}

TEST_CASE("plain and causal") {
  AttentionCase c = base();
  check_plain(kernel<BFloat16, 16, 16, 4, Mode::kFast>(), c);
}

TEST_CASE("a token or a few, blocks of any size") {
  AttentionCase c = base();
  for (const auto& k :
       {kernel<Float16, 16, 16, 4, Mode::kFast>(), kernel<BFloat16, 32, 32, 3, Mode::kFast>()})
    for (int block_size : {1, 16, 64})
      for (int heads : {1, 16, 128}) {
        c.block_size = block_size, c.num_heads = heads;
        c.batch = {{1, 77}, {1, 1}, {heads > 16 ? 2 : 4, 40}};
        check_case(k, c, AsyncMode::kRandom, static_cast<uint32_t>(block_size + heads));
      }
}

TEST_CASE("every option") {
  check_options(kernel<Float16, 16, 16, 4, Mode::kFull>(), base());
  AttentionCase c = base();
  c.batch = {{9, 60}, {1, 530}};
  c.softcap = 3, c.alibi = c.sinks = c.mask = c.mask_is_tree = true;
  c.cache = Cache::kOdd;
  check_case(kernel<BFloat16, 32, 32, 2, Mode::kFull>(), c);
}

TEST_CASE("chunks of keys") {
  check_chunks(kernel<Float16, 16, 16, 4, Mode::kFast>(), base());
  AttentionCase c = base();
  c.batch = {{10, 1100}, {1, 600}};
  c.parallelism = 6;
  check_case(kernel<BFloat16, 32, 32, 3, Mode::kFast>(), c);
}

TEST_CASE("bits do not depend on how the work is cut") {
  AttentionCase c = base();
  c.batch = {{9, 1100}, {1, 530}};
  check_bits(kernel<Float16, 16, 16, 4, Mode::kFast>(), c);
  check_bits(kernel<BFloat16, 32, 32, 2, Mode::kFast>(), c);
}

}  // namespace
}  // namespace quire::emulator
