// SPDX-License-Identifier: Apache-2.0
// Likewise the prefill kernel of compute capability 9.0a: by boxes, then by gathering; then
// with an option.
#include "emulator/mutation.h"
#include "kernels/sm90/prefill.h"

namespace quire::emulator {
namespace {

std::string run_all(uint32_t seed) {
  // Of 2^-126 no attention tells: what a row sees is that much more.
  if (device::exp2_by_polynomial(-INFINITY) != 0) return "a hidden key has a weight";
  using Prefill =
      device::Sm90PrefillTraits<device::Float16, 128, 128, 128, 128, 2, device::Mode::kFast>;
  const AttentionKernel prefill = bind<Prefill>(device::prefill_sm90<Prefill>);
  AttentionCase c;
  c.head_dim = c.head_dim_v = 128;
  c.num_heads = 2, c.num_kv_heads = 1;
  c.batch = {{5, 1}, {70, 449}, {3, 0}, {1, 1}, {4, 1060}};
  c.batch.insert(c.batch.end(), 6, {2, 0});
  for (const int block_size : {16, 7}) {
    c.block_size = block_size;
    const std::string error = run(prefill, c, prefill.rows, seed);
    if (!error.empty()) return error;
  }
  using Short =
      device::Sm90PrefillTraits<device::Float16, 64, 64, 128, 128, 3, device::Mode::kFast>;
  c.head_dim = c.head_dim_v = 64;
  c.batch = {{9, 40}, {1, 0}};
  const std::string error = run(bind<Short>(device::prefill_sm90<Short>), c, Short::kRows, seed);
  if (!error.empty()) return error;
  using Options =
      device::Sm90PrefillTraits<device::Float16, 64, 64, 128, 128, 3, device::Mode::kFull>;
  c.batch = {{70, 449}, {3, 0}};
  c.softcap = 3;
  return run(bind<Options>(device::prefill_sm90<Options>), c, Options::kRows, seed);
}

}  // namespace
}  // namespace quire::emulator

int main() { return quire::emulator::run_seeds(quire::emulator::run_all); }
