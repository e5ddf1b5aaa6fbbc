// SPDX-License-Identifier: Apache-2.0
// What every attention kernel must pass: a sweep against the float64 reference, the edge contract,
// and equal bits however the work is cut, ordered and timed.
#pragma once

#include <doctest/doctest.h>

#include <vector>

#include "emulator/reference.h"
#include "emulator/run_attention.h"

namespace quire::emulator {

inline Report check_case(const AttentionKernel& kernel, const AttentionCase& c,
                         AsyncMode async = AsyncMode::kLazy, uint32_t seed = 1) {
  AttentionProblem problem(c, kernel.is_bfloat16, kernel.rows, seed);
  Options options;
  options.async = async;
  options.seed = seed;
  const Report report = run_attention(kernel, problem, options);
  REQUIRE(report.error == "");
  CHECK(report.ldmatrix_conflicts == 0);
  CHECK(compare_with_reference(problem) == "");
  for (uint32_t counter : problem.workspace.counters) CHECK(counter == 0);
  return report;
}

// A batch with decode rows, prompts, chunks of prompts, nothing to compute and nothing to see.
inline const std::vector<Lengths> kMixed = {{1, 53},  {7, 7}, {0, 5}, {1, 1},
                                            {33, 90}, {5, 0}, {9, 4}};

// One axis at a time; `c` is what the kernel can do at least.
inline void check_plain(const AttentionKernel& kernel, AttentionCase c) {
  c.batch = kMixed;
  for (bool causal : {true, false}) {
    c.causal = causal;
    for (Layout layout : {Layout::kPaged, Layout::kRagged}) {
      c.layout = layout;
      check_case(kernel, c);
    }
    AttentionCase dense = c;
    dense.layout = Layout::kDense;
    dense.batch = {{19, 45}, {19, 45}};
    check_case(kernel, dense);
  }
  c.causal = true;
  c.layout = Layout::kPaged;
  c.cache = Cache::kHnd;
  check_case(kernel, c);
  c.cache = Cache::kNhd;
  for (int block_size : {1, 5, 200}) {
    c.block_size = block_size;
    check_case(kernel, c);
  }
  c.block_size = 16;
  for (auto [heads, kv_heads] : {std::pair{1, 1}, {3, 1}, {40, 2}}) {
    c.num_heads = heads, c.num_kv_heads = kv_heads;
    check_case(kernel, c);
  }
  c.num_heads = 4, c.num_kv_heads = 2;
  const int piece = c.codes == Codes::kNone ? 8 : 16;
  c.head_dim -= piece, c.head_dim_v -= 3 * piece;
  check_case(kernel, c);
}

inline void check_options(const AttentionKernel& kernel, AttentionCase c) {
  c.batch = kMixed;
  for (auto [left, right] : {std::pair{16, 0}, {10, -1}, {0, 0}, {3, 5}, {-1, 4}}) {
    AttentionCase windowed = c;
    windowed.causal = false;
    windowed.window_left = left, windowed.window_right = right;
    check_case(kernel, windowed);
  }
  AttentionCase all = c;
  all.causal = false;
  all.window_left = 40, all.window_right = 3;
  const auto with = [&](auto change) {
    AttentionCase one = c;
    change(one), change(all);
    check_case(kernel, one);
  };
  with([](AttentionCase& x) { x.softcap = 3; });
  with([](AttentionCase& x) { x.alibi = true; });
  with([](AttentionCase& x) { x.sinks = true; });
  with([](AttentionCase& x) { x.cache = Cache::kOdd; });
  with([](AttentionCase& x) { x.head_dim -= 5, x.head_dim_v -= 1; });
  with([](AttentionCase& x) { x.mask = true; });
  check_case(kernel, all);
  with([](AttentionCase& x) { x.mask_is_tree = x.mask = true; });
  check_case(kernel, all);
}

// More chunks than one, in one work item and in several; no order or timing of copies matters.
inline void check_chunks(const AttentionKernel& kernel, AttentionCase c) {
  c.batch = {{3, 1100}, {2, 512}, {1, 600}, {2, 513}};
  for (int parallelism : {1, 6}) {
    c.parallelism = parallelism;
    for (AsyncMode async : {AsyncMode::kLazy, AsyncMode::kEager, AsyncMode::kRandom})
      check_case(kernel, c, async, 2 + static_cast<uint32_t>(async));
  }
}

// Codes for K and V: every kind of scale, over one chunk and several, in one item and in many.
inline void check_codes(const AttentionKernel& kernel, AttentionCase c) {
  for (Codes codes : {Codes::kTensor, Codes::kHead, Codes::kToken}) {
    c.codes = codes;
    for (Cache cache : {Cache::kNhd, Cache::kHnd}) {
      c.cache = cache;
      c.batch = kMixed;
      check_case(kernel, c, AsyncMode::kRandom, 3);
    }
    c.cache = Cache::kNhd;
    c.batch = {{3, 1100}, {2, 513}, {40, 90}};
    c.parallelism = codes == Codes::kHead ? 1 : 6;
    check_case(kernel, c, AsyncMode::kLazy, 4);
  }
}

// `c` has several chunks of keys.
inline void check_bits(const AttentionKernel& kernel, AttentionCase c) {
  std::vector<uint16_t> out;
  std::vector<float> lse;
  uint32_t seed = 10;
  for (int parallelism : {1, 4})
    for (int max_rows : {kernel.rows, 2, 2 * kernel.rows}) {
      c.parallelism = parallelism;
      AttentionProblem problem(c, kernel.is_bfloat16, max_rows);
      std::shuffle(problem.plan.items.begin(), problem.plan.items.end(), std::mt19937(seed));
      Options options;
      options.seed = ++seed;
      options.check_races = false;
      REQUIRE(run_attention(kernel, problem, options, parallelism).error == "");
      if (out.empty()) out = problem.out_bits(), lse = problem.lse_values();
      CHECK(problem.out_bits() == out);
      CHECK(problem.lse_values() == lse);
    }
}

}  // namespace quire::emulator
