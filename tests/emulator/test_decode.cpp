// SPDX-License-Identifier: Apache-2.0
// The decode kernel over tile shapes, types and modes.
#include <doctest/doctest.h>

#include "emulator/attention_suite.h"
#include "kernels/decode.h"

namespace quire::emulator {
namespace {

using device::BFloat16;
using device::Float16;
using device::Mode;

template <class Type, int kHeadDim, int kWarps, int kStages, Mode kMode>
AttentionKernel kernel() {
  using Traits = device::DecodeTraits<Type, kHeadDim, kWarps, kStages, kMode>;
  return bind<Traits>(device::decode<Traits>);
}

AttentionCase base(int head_dim) {
  AttentionCase c;
  c.head_dim = c.head_dim_v = head_dim;
  return c;
}

TEST_CASE("plain and causal") {
  check_plain(kernel<BFloat16, 64, 4, 4, Mode::kFast>(), base(64));
  check_plain(kernel<Float16, 128, 4, 3, Mode::kFast>(), base(128));
}

TEST_CASE("every option") { check_options(kernel<Float16, 64, 4, 4, Mode::kFull>(), base(64)); }

TEST_CASE("chunks of keys") { check_chunks(kernel<Float16, 64, 4, 4, Mode::kFast>(), base(64)); }

TEST_CASE("bits do not depend on how the work is cut") {
  AttentionCase c = base(64);
  c.batch = {{5, 1300}, {1, 530}, {18, 700}};
  check_bits(kernel<Float16, 64, 4, 4, Mode::kFast>(), c);
}

TEST_CASE("a batch of decode rows") {
  AttentionCase c = base(64);
  c.batch.clear();
  for (int seq_len : {1, 16, 17, 511, 512, 513, 1100}) c.batch.push_back({1, seq_len});
  c.parallelism = 4;
  check_case(kernel<Float16, 64, 4, 4, Mode::kFast>(), c);
}

TEST_CASE("more partial results than are loaded at once") {
  AttentionCase c = base(64);
  c.batch = {{1, 11 * kKvChunk + 40}};
  c.parallelism = 8;
  check_case(kernel<Float16, 64, 4, 4, Mode::kFast>(), c);
  check_bits(kernel<Float16, 64, 4, 4, Mode::kFast>(), c);
}

TEST_CASE("tile shapes") {
  AttentionCase c;
  c.batch = {{2, 130}, {1, 1}, {1, 600}};
  const auto check = [&c](const AttentionKernel& k) {
    c.head_dim = c.head_dim_v = k.head_dim;
    check_case(k, c);
  };
  check(kernel<Float16, 96, 4, 3, Mode::kFast>());
  check(kernel<BFloat16, 192, 4, 2, Mode::kFast>());
  check(kernel<Float16, 256, 4, 2, Mode::kFull>());
  check(kernel<Float16, 64, 2, 2, Mode::kFast>());
  check(kernel<Float16, 256, 2, 2, Mode::kFast>());
}

template <class Type, int kHeadDim, int kWarps, int kStages, Mode kMode>
AttentionKernel e4m3_kernel() {
  using Traits = device::DecodeTraits<Type, kHeadDim, kWarps, kStages, kMode, device::Float8E4M3>;
  return bind<Traits>(device::decode<Traits>);
}

TEST_CASE("e4m3 codes, fast") {
  check_codes(e4m3_kernel<BFloat16, 128, 4, 4, Mode::kFast>(), base(128));
  AttentionCase c = base(128);
  c.codes = Codes::kToken;
  c.batch = {{5, 1300}, {18, 700}};
  check_bits(e4m3_kernel<BFloat16, 128, 4, 4, Mode::kFast>(), c);
}

TEST_CASE("e4m3 codes, every option") {
  const auto kernel = e4m3_kernel<Float16, 64, 4, 4, Mode::kFull>();
  for (Codes codes : {Codes::kHead, Codes::kToken}) {
    AttentionCase c = base(64);
    c.codes = codes;
    check_options(kernel, c);
  }
}

TEST_CASE("e4m3 codes, queries not kept") {
  AttentionCase c = base(256);
  c.batch = {{2, 130}, {1, 1}, {1, 600}};
  c.codes = Codes::kToken;
  check_case(e4m3_kernel<BFloat16, 256, 4, 2, Mode::kFast>(), c);
}

}  // namespace
}  // namespace quire::emulator
