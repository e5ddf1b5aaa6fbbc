// SPDX-License-Identifier: Apache-2.0
// Likewise the kernel over latent caches of compute capability 9.0a: by boxes and by gathering,
// rows that fill no tile, pieces of a sequence, places in the workspace.
#include <cmath>

#include "emulator/mutation.h"
#include "kernels/sm90/mla_decode.h"

namespace quire::emulator {
namespace {

// A block a tile of rows. Blocks run one after the other, so that results do not tell whether they
// share a place.
std::string run_apart(const AttentionKernel& kernel, const AttentionCase& c, uint32_t seed) {
  AttentionProblem problem(c, kernel.is_bfloat16, kernel.rows);
  Options options;
  options.seed = seed;
  options.async = static_cast<AsyncMode>(seed % 3);
  const int tiles = device::ceil_div(c.num_heads, kernel.rows);
  const int blocks = static_cast<int>(problem.plan.items.size()) * tiles;
  const Report report = run_attention(kernel, problem, options, blocks);
  if (!report.ok()) return report.error;
  for (const float value : problem.workspace.totals)
    if (std::isnan(value)) return "a block has not used its place";
  return compare_with_reference(problem);
}

std::string run_all(uint32_t seed) {
  using Traits = device::Sm90MlaTraits<device::Float16, 576, 64, 32, 4, device::Mode::kFast>;
  const AttentionKernel decode = bind<Traits>(device::mla_decode_sm90<Traits>);
  AttentionCase c;
  c.head_dim = 576, c.head_dim_v = 512;
  c.num_heads = 70, c.num_kv_heads = 1;
  c.is_latent = true;
  c.batch = {{1, 75}, {1, 0}};
  std::string error = run_apart(decode, c, seed);
  if (!error.empty()) return error;
  c.num_heads = 35;  // an item of two tiles of rows, and one that has no second
  c.batch = {{1, 40}, {2, 33}};
  c.batch.insert(c.batch.end(), 4, {1, 0});
  c.block_size = 7;
  error = run(decode, c, 70, seed, 5, 1);
  if (!error.empty()) return error;
  c.num_heads = 70;  // pieces of which both tiles are merged
  c.batch = {{1, 514}};
  c.block_size = 16;
  return run(decode, c, 70, seed);
}

}  // namespace
}  // namespace quire::emulator

int main() { return quire::emulator::run_seeds(quire::emulator::run_all); }
