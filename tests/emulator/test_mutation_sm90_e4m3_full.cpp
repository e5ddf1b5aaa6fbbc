// SPDX-License-Identifier: Apache-2.0
// Likewise the prefill kernel of e4m3 queries with every option: tiles of 64 columns by boxes with
// scales of tokens, then tiles of 128 by gathering.
#include "emulator/mutation.h"
#include "kernels/sm90/prefill_e4m3.h"

namespace quire::emulator {
namespace {

template <int kHeadDim>
AttentionKernel kernel() {
  using Traits =
      device::Sm90E4m3Traits<device::BFloat16, kHeadDim, 128, 128, 4, device::Mode::kFull>;
  return bind<Traits>(device::prefill_e4m3_sm90<Traits>);
}

std::string run_all(uint32_t seed) {
  const AttentionKernel narrow = kernel<64>(), wide = kernel<128>();
  AttentionCase c;
  c.code_queries = true;
  c.num_heads = 2, c.num_kv_heads = 1;
  c.codes = Codes::kToken;
  c.alibi = true;
  c.mask = c.mask_is_tree = true;
  c.batch = {{5, 1}, {70, 300}, {3, 0}, {4, 1060}};
  const std::string error = run(narrow, c, narrow.rows, seed);
  if (!error.empty()) return error;
  c.head_dim = c.head_dim_v = 117;
  c.codes = Codes::kTensor;
  c.softcap = 3;
  c.mask_is_tree = false;
  c.block_size = 7;
  c.batch = {{9, 140}, {1, 0}};
  return run(wide, c, wide.rows, seed);
}

}  // namespace
}  // namespace quire::emulator

int main() { return quire::emulator::run_seeds(quire::emulator::run_all); }
