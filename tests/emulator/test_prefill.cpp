// SPDX-License-Identifier: Apache-2.0
// The prefill kernel over tile shapes, types and modes.
#include <doctest/doctest.h>

#include "emulator/attention_suite.h"
#include "kernels/prefill.h"

namespace quire::emulator {
namespace {

using device::BFloat16;
using device::Float16;
using device::Mode;

template <class Type, int kHeadDim, int kRows, int kKeys, Mode kMode>
AttentionKernel kernel() {
  using Traits = device::PrefillTraits<Type, kHeadDim, kRows, kKeys, kMode>;
  return bind<Traits>(device::prefill<Traits>);
}

AttentionCase base(int head_dim) {
  AttentionCase c;
  c.head_dim = c.head_dim_v = head_dim;
  return c;
}

TEST_CASE("plain and causal") {
  check_plain(kernel<Float16, 64, 64, 64, Mode::kFast>(), base(64));
  check_plain(kernel<BFloat16, 128, 64, 64, Mode::kFast>(), base(128));
}

TEST_CASE("every option") { check_options(kernel<Float16, 64, 64, 64, Mode::kFull>(), base(64)); }

TEST_CASE("chunks of keys") { check_chunks(kernel<BFloat16, 64, 64, 64, Mode::kFast>(), base(64)); }

TEST_CASE("bits do not depend on how the work is cut") {
  AttentionCase c = base(64);
  c.batch = {{5, 1300}, {1, 530}, {18, 700}};
  check_bits(kernel<Float16, 64, 64, 64, Mode::kFast>(), c);
}

TEST_CASE("tile shapes") {
  AttentionCase c;
  c.batch = {{70, 130}, {1, 1}, {9, 600}};
  const auto check = [&c](const AttentionKernel& k) {
    c.head_dim = c.head_dim_v = k.head_dim;
    check_case(k, c);
  };
  check(kernel<Float16, 96, 64, 64, Mode::kFast>());
  check(kernel<Float16, 128, 128, 64, Mode::kFast>());
  check(kernel<Float16, 192, 64, 32, Mode::kFast>());
  check(kernel<BFloat16, 256, 64, 32, Mode::kFull>());
  check(kernel<Float16, 256, 32, 16, Mode::kFast>());
}

template <class Type, int kHeadDim, int kRows, int kKeys, Mode kMode>
AttentionKernel e4m3_kernel() {
  using Traits = device::PrefillTraits<Type, kHeadDim, kRows, kKeys, kMode, device::Float8E4M3>;
  return bind<Traits>(device::prefill<Traits>);
}

TEST_CASE("e4m3 codes, fast") {
  const auto kernel = e4m3_kernel<BFloat16, 128, 64, 64, Mode::kFast>();
  check_codes(kernel, base(128));
  AttentionCase c = base(128);
  c.codes = Codes::kToken;
  c.batch = {{5, 1300}, {18, 700}};
  check_bits(kernel, c);
}

TEST_CASE("e4m3 codes, every option") {
  AttentionCase c = base(64);
  c.codes = Codes::kToken;
  check_options(e4m3_kernel<Float16, 64, 64, 64, Mode::kFull>(), c);
}

TEST_CASE("e4m3 codes, queries not kept") {
  AttentionCase c = base(256);
  c.batch = {{70, 130}, {1, 1}, {9, 600}};
  c.codes = Codes::kToken;
  check_case(e4m3_kernel<Float16, 256, 32, 32, Mode::kFast>(), c);
}

}  // namespace
}  // namespace quire::emulator
