// SPDX-License-Identifier: Apache-2.0
// Likewise the prefill kernel of e4m3 queries: by boxes with scales of tokens, then by gathering.
#include "emulator/mutation.h"
#include "kernels/sm90/prefill_e4m3.h"

namespace quire::emulator {
namespace {

std::string run_all(uint32_t seed) {
  using Prefill = device::Sm90E4m3Traits<device::BFloat16, 128, 128, 128, 4, device::Mode::kFast>;
  const AttentionKernel prefill = bind<Prefill>(device::prefill_e4m3_sm90<Prefill>);
  AttentionCase c;
  c.head_dim = c.head_dim_v = 128;
  c.code_queries = true;
  c.num_heads = 2, c.num_kv_heads = 1;
  c.codes = Codes::kToken;
  c.batch = {{5, 1}, {70, 300}, {3, 0}, {4, 1060}};
  const std::string error = run(prefill, c, prefill.rows, seed);
  if (!error.empty()) return error;
  c.codes = Codes::kTensor;
  c.block_size = 7;
  c.batch = {{9, 140}, {1, 0}};
  return run(prefill, c, prefill.rows, seed);
}

}  // namespace
}  // namespace quire::emulator

int main() { return quire::emulator::run_seeds(quire::emulator::run_all); }
