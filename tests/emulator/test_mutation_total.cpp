// SPDX-License-Identifier: Apache-2.0
// Likewise the prefill kernel of compute capability 9.0a whose total is in global memory.
#include "emulator/mutation.h"
#include "kernels/sm90/prefill.h"

namespace quire::emulator {
namespace {

using Traits =
    device::Sm90PrefillTraits<device::Float16, 256, 256, 128, 64, 2, device::Mode::kFast>;

// What is wrong with one run, or an empty string.
std::string run_once(const AttentionKernel& prefill, const AttentionCase& c, uint32_t seed) {
  AttentionProblem problem(c, prefill.is_bfloat16, prefill.rows);
  Options options;
  options.seed = seed;
  options.async = static_cast<AsyncMode>(seed % 3);
  const auto blocks = static_cast<int>(problem.plan.items.size());
  const Report report = run_attention(prefill, problem, options, blocks);
  if (!report.ok()) return report.error;
  // Blocks run one after the other, so that results do not tell whether they share a place.
  for (const float value : problem.workspace.totals)
    if (std::isnan(value)) return "a block has not used its place";
  return compare_with_reference(problem);
}

std::string run_all(uint32_t seed) {
  const AttentionKernel prefill = bind<Traits>(device::prefill_sm90<Traits>);
  AttentionCase c;
  c.head_dim = c.head_dim_v = 256;
  c.num_heads = 2, c.num_kv_heads = 1;
  c.batch = {{35, 530}, {1, 0}};
  return run_once(prefill, c, seed);
}

}  // namespace
}  // namespace quire::emulator

int main() { return quire::emulator::run_seeds(quire::emulator::run_all); }
