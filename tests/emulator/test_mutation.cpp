// SPDX-License-Identifier: Apache-2.0
// Runs the attention kernels over a few cases for several seeds. Exit status 0: all passed; 2: for
// every seed something was caught; 1: only some seeds caught it. mutations.py builds it.
#include <cstdio>
#include <string>

#include "emulator/reference.h"
#include "emulator/run_attention.h"
#include "kernels/decode.h"
#include "kernels/prefill.h"

namespace quire::emulator {
namespace {

using device::Float16;
using device::Mode;

// What is wrong with one run, or an empty string.
std::string run(const AttentionKernel& kernel, const AttentionCase& c, int max_rows,
                uint32_t seed) {
  std::string result;
  std::vector<uint16_t> bits;
  for (int parallelism : {1, 5}) {
    AttentionCase cut = c;
    cut.parallelism = parallelism;
    AttentionProblem problem(cut, kernel.is_bfloat16, parallelism == 1 ? max_rows : 4);
    Options options;
    options.seed = seed;
    options.async = static_cast<AsyncMode>(seed % 3);
    const Report report = run_attention(kernel, problem, options);
    if (!report.ok()) return report.error;
    if (report.ldmatrix_conflicts > 0) return "bank conflicts";
    result = compare_with_reference(problem);
    if (!result.empty()) return result;
    for (uint32_t counter : problem.workspace.counters)
      if (counter != 0) return "a counter is not zero";
    if (!bits.empty() && bits != problem.out_bits()) return "bits depend on how the work is cut";
    bits = problem.out_bits();
  }
  return {};
}

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

int main() {
  constexpr int kSeeds = 6;
  int caught = 0;
  std::string last;
  for (uint32_t seed = 1; seed <= kSeeds; ++seed) {
    const std::string error = quire::emulator::run_all(seed);
    if (error.empty()) continue;
    ++caught;
    last = error;
  }
  std::printf("%d of %d seeds: %s\n", caught, kSeeds, last.c_str());
  return caught == 0 ? 0 : caught == kSeeds ? 2 : 1;
}
