// SPDX-License-Identifier: Apache-2.0
// Runs an attention kernel on the emulator over a problem.
#pragma once

#include "emulator/attention_case.h"
#include "emulator/run_kernel.h"

namespace quire::emulator {

inline Report run_attention(const AttentionKernel& kernel, AttentionProblem& problem,
                            Options options, int blocks = 3) {
  const int piece = problem.c.codes == Codes::kNone ? 8 : 16;
  const bool is_aligned = problem.c.cache != Cache::kOdd && problem.c.head_dim % piece == 0 &&
                          problem.c.head_dim_v % piece == 0;
  options.global = problem.global();
  return run_kernel(kernel, problem.params, problem.plan, is_aligned, problem.workspace, options,
                    blocks);
}

}  // namespace quire::emulator
