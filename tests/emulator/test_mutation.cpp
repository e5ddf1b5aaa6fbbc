// SPDX-License-Identifier: Apache-2.0
// Runs the attention kernels over a few cases for several seeds. mutations.py builds it.
#include "emulator/mutation.h"
#include "kernels/decode.h"
#include "kernels/prefill.h"

namespace quire::emulator {
namespace {

using device::Float16;
using device::Mode;

std::string run_all(uint32_t seed) {
  using Prefill = device::PrefillTraits<Float16, 64, 64, 64, Mode::kFast>;
  using Decode = device::DecodeTraits<Float16, 64, 4, 3, Mode::kFast>;
  using FullDecode = device::DecodeTraits<Float16, 64, 4, 3, Mode::kFull>;
  const AttentionKernel prefill = bind<Prefill>(device::prefill<Prefill>);
  const AttentionKernel decode = bind<Decode>(device::decode<Decode>);
  AttentionCase c;
  c.batch = {{5, 1}, {70, 149}, {3, 0}, {1, 1}, {4, 1060}};
  c.block_size = 7;
  for (const AttentionKernel* kernel : {&prefill, &decode}) {
    const std::string error = run(*kernel, c, kernel->rows, seed);
    if (!error.empty()) return error;
  }
  using Codes8 = device::Float8E4M3;
  using CodePrefill = device::PrefillTraits<Float16, 64, 64, 64, Mode::kFast, Codes8>;
  using CodeDecode = device::DecodeTraits<Float16, 64, 4, 3, Mode::kFast, Codes8>;
  AttentionCase codes = c;
  codes.codes = Codes::kToken;
  for (const AttentionKernel& kernel : {bind<CodePrefill>(device::prefill<CodePrefill>),
                                        bind<CodeDecode>(device::decode<CodeDecode>)}) {
    const std::string error = run(kernel, codes, kernel.rows, seed);
    if (!error.empty()) return error;
  }
  c.window_left = 37;
  c.head_dim = c.head_dim_v = 40;
  return run(bind<FullDecode>(device::decode<FullDecode>), c, 16, seed);
}

}  // namespace
}  // namespace quire::emulator

int main() { return quire::emulator::run_seeds(quire::emulator::run_all); }
