// SPDX-License-Identifier: Apache-2.0
// What the programs that mutations.py builds share. Exit status 0: all passed; 2: for every seed
// something was caught; 1: only some seeds caught it.
#pragma once

#include <cstdio>
#include <string>

#include "emulator/reference.h"
#include "emulator/run_attention.h"

namespace quire::emulator {

// What is wrong with one run, or an empty string: whole sequences, then cut for some workers.
inline std::string run(const AttentionKernel& kernel, const AttentionCase& c, int max_rows,
                       uint32_t seed, int workers = 5, int blocks = 3) {
  std::string result;
  std::vector<uint16_t> bits;
  for (int parallelism : {1, workers}) {
    AttentionCase cut = c;
    cut.parallelism = parallelism;
    AttentionProblem problem(cut, kernel.is_bfloat16, parallelism == 1 ? max_rows : 4);
    Options options;
    options.seed = seed;
    options.async = static_cast<AsyncMode>(seed % 3);
    const Report report = run_attention(kernel, problem, options, blocks);
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

// `run_all`: what is wrong with the kernels for a seed.
inline int run_seeds(std::string (*run_all)(uint32_t seed)) {
  constexpr int kSeeds = 6;
  int caught = 0;
  std::string last;
  for (uint32_t seed = 1; seed <= kSeeds; ++seed) {
    const std::string error = run_all(seed);
    if (error.empty()) continue;
    ++caught;
    last = error;
  }
  std::printf("%d of %d seeds: %s\n", caught, kSeeds, last.c_str());
  return caught == 0 ? 0 : caught == kSeeds ? 2 : 1;
}

}  // namespace quire::emulator
