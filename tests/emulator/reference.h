// SPDX-License-Identifier: Apache-2.0
// Attention in float64, written to be obviously right, and the same computed naively in the low
// precision, whose error is the measure for a kernel's.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "emulator/attention_case.h"

namespace quire::emulator {

struct ReferenceRow {
  std::vector<double> out, naive_out;
  double lse;
  double lse_error;  // that is allowed
};

// Sums of products of codes are cut to 14 bits of the largest term every 32 columns: each of 33
// terms by less than 2^-13 of it, and by half of that on average.
inline double score_error(const AttentionProblem& problem, int b, int i, int head, int key) {
  double sum = 0, top = 0, error = 0;
  for (int d = 0; d < problem.c.head_dim; ++d) {
    if (d % 32 == 0) error += 33 * top, top = std::fabs(sum);
    const double product = problem.q(b, i, head, d) * problem.k(b, key, head, d);
    top = std::max(top, std::fabs(product));
    sum += product;
  }
  return (error + 33 * top) / 8192 / 2 * std::fabs(problem.params.scale);
}

inline bool is_visible(const AttentionProblem& problem, int b, int i, int key) {
  const AttentionCase& c = problem.c;
  const auto [q_len, seq_len] = c.batch[b];
  const int position = seq_len - q_len + i;
  if (c.causal && key > position) return false;
  if (c.window_left >= 0 && key < position - c.window_left) return false;
  if (c.window_right >= 0 && key > position + c.window_right) return false;
  const int first_bit_key = c.mask_is_tree ? seq_len - q_len : 0;
  return !c.mask || key < first_bit_key || problem.mask_bit(b, i, key - first_bit_key);
}

inline double logit(const AttentionProblem& problem, int b, int i, int head, int key) {
  const AttentionCase& c = problem.c;
  double x = 0;
  for (int d = 0; d < c.head_dim; ++d) x += problem.q(b, i, head, d) * problem.k(b, key, head, d);
  x *= problem.params.scale;
  if (c.softcap > 0) x = c.softcap * std::tanh(x / c.softcap);
  const int position = c.batch[b].seq_len - c.batch[b].q_len + i;
  return x - problem.slope(head) * std::abs(position - key);
}

inline ReferenceRow reference_row(const AttentionProblem& problem, int b, int i, int head) {
  const AttentionCase& c = problem.c;
  const int seq_len = c.batch[b].seq_len;
  const auto rounded = [&](double x) {
    const auto f = static_cast<float>(x);
    return double{problem.is_bfloat16 ? widen_bfloat16(narrow_bfloat16(f))
                                      : widen_float16(narrow_float16(f))};
  };
  std::vector<double> exact(seq_len, -INFINITY), naive(seq_len, -INFINITY);
  for (int j = 0; j < seq_len; ++j)
    if (is_visible(problem, b, i, j)) {
      exact[j] = logit(problem, b, i, head, j);
      naive[j] = rounded(exact[j]);
    }
  ReferenceRow row{std::vector<double>(c.head_dim_v), std::vector<double>(c.head_dim_v), -INFINITY,
                   1e-4};
  double top = -INFINITY, sum = 0, naive_sum = 0;
  for (double x : exact) top = std::max(top, x);
  if (top == -INFINITY) return row;
  for (double x : exact) sum += std::exp(x - top);
  for (double x : naive) naive_sum += std::exp(x - top);
  if (c.sinks) {
    sum += std::exp(problem.sink(head) - top);
    naive_sum += std::exp(problem.sink(head) - top);
  }
  row.lse = top + std::log(sum);
  // Where queries are codes, so are weights: times the scale of their token, and times the power of
  // two that brings the largest near the largest code.
  double base = -INFINITY;
  const auto token_scale = [&](int j) { return problem.v_token_scale(b, j, head); };
  for (int j = 0; c.code_queries && j < seq_len; ++j)
    base = std::max(base, (exact[j] - top) / std::log(2.0) + std::ilogb(token_scale(j)));
  const auto rounded_weight = [&](double x, int j) {
    if (!c.code_queries) return x;
    const double factor = std::exp2(7 - base) * token_scale(j);
    return e4m3_table()[narrow_e4m3(static_cast<float>(factor * x))] / factor;
  };
  for (int j = 0; c.code_queries && j < seq_len; ++j)
    if (std::exp(exact[j] - top) > 1e-6)
      row.lse_error = std::max(row.lse_error, score_error(problem, b, i, head, j));
  for (int j = 0; j < seq_len; ++j) {
    if (exact[j] == -INFINITY) continue;
    const double weight = std::exp(exact[j] - top) / sum;
    const double naive_weight = rounded(rounded_weight(std::exp(naive[j] - top), j) / naive_sum);
    for (int d = 0; d < c.head_dim_v; ++d) {
      const double value = problem.v(b, j, head, d);
      row.out[d] += weight * value;
      row.naive_out[d] += naive_weight * value;
    }
  }
  for (double& x : row.naive_out) x = rounded(x);
  return row;
}

// Empty, or what is wrong with the problem's outputs.
inline std::string compare_with_reference(const AttentionProblem& problem) {
  const AttentionCase& c = problem.c;
  double error = 0, naive_error = 0;
  for (int b = 0; b < static_cast<int>(c.batch.size()); ++b)
    for (int i = 0; i < c.batch[b].q_len; ++i)
      for (int head = 0; head < c.num_heads; ++head) {
        const ReferenceRow row = reference_row(problem, b, i, head);
        const std::string place = " of sequence " + std::to_string(b) + " row " +
                                  std::to_string(i) + " head " + std::to_string(head);
        for (int d = 0; d < c.head_dim_v; ++d) {
          const double out = problem.out(b, i, head, d);
          if (!std::isfinite(out))
            return "out is not finite at column " + std::to_string(d) + place;
          if (std::isinf(row.lse) && out != 0) return "out is not 0" + place;
          error = std::max(error, std::fabs(out - row.out[d]));
          naive_error = std::max(naive_error, std::fabs(row.naive_out[d] - row.out[d]));
        }
        const double lse = problem.lse(b, i, head);
        if (std::isinf(row.lse) ? lse != row.lse : !std::isfinite(lse))
          return "lse is " + std::to_string(lse) + place;
        if (std::isinf(row.lse)) continue;
        const double lse_error = std::fabs(lse - row.lse);
        if (lse_error > row.lse_error) return "lse error " + std::to_string(lse_error) + place;
      }
  const double factor = problem.plan.num_partials > 0 || c.codes != Codes::kNone ? 3 : 2;
  if (error > factor * naive_error + 1e-5)
    return "error " + std::to_string(error) + ", naive error " + std::to_string(naive_error);
  return {};
}

}  // namespace quire::emulator
