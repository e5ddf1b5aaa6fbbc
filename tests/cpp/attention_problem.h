// SPDX-License-Identifier: Apache-2.0
// An attention call with random data, its answer in double precision, and the rule of how close a
// kernel must come. Whatever must not be read is NaN. Included after doctest.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "array.h"
#include "quire/attention.h"

namespace quire::test {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Mask { kNone, kFull, kTree };

struct Case {
  AttentionDesc desc;
  std::vector<std::pair<int, int>> batch = {{1, 70}, {5, 33}, {0, 9},    {9, 530},
                                            {3, 0},  {6, 4},  {1, 1100}, {17, 17}};
  // Per sequence, {group, tokens}: its blocks up to there are those of the group's other members.
  // Several, with rising tokens: what it has in common with more, then with fewer others.
  std::vector<std::vector<std::pair<int, int>>> prefixes;
  bool head_major = false;
  bool token_scales = false;  // of a quantised cache; else one for k and one for v
  bool alibi = false;
  bool sinks = false;
  Mask mask = Mask::kNone;
  float poison = kNaN;  // in whatever must not be read

  Case() {
    desc.num_heads = 4;
    desc.num_kv_heads = 2;
    desc.head_dim = desc.head_dim_v = 64;
    desc.dtype = desc.kv_dtype = DType::kFloat32;
    desc.block_size = 16;
    desc.causal = true;
    desc.scale = 0.2f;
  }
};

struct Result {
  Array out;
  std::vector<float> lse;
  bool operator==(const Result& other) const {
    return out == other.out &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
  }
};

// A case with data, as one call.
class Problem {
 public:
  explicit Problem(const Case& c)
      : case_(c),
        desc_(c.desc),
        q_(desc_.dtype, 0, 0),
        k_{Array(desc_.kv_dtype, 0, 0), {}, good_scale()},
        v_{Array(desc_.kv_dtype, 0, 0), {}, good_scale()} {
    cu_q_ = cu_k_ = {0};
    for (const auto& [q_len, seq_len] : c.batch) {
      cu_q_.push_back(cu_q_.back() + q_len);
      cu_k_.push_back(cu_k_.back() + seq_len);
      seq_lens_.push_back(seq_len);
    }
    place_keys();
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;
    q_ = Array(desc_.dtype, int64_t{total_q()} * desc_.num_heads * desc_.head_dim, 0);
    for (int64_t i = 0; i < q_.size(); ++i) q_.set(i, normal(rng));
    fill(k_, desc_.head_dim, rng);
    fill(v_, desc_.head_dim_v, rng);
    for (int h = 0; h < desc_.num_heads; ++h) {
      slopes_.push_back(0.02f * static_cast<float>(h + 1));
      sinks_.push_back(normal(rng));
    }
    mask_bytes_ = (1 + *std::max_element(seq_lens_.begin(), seq_lens_.end())) / 8 + 5;
    mask_.resize(static_cast<size_t>(total_q()) * mask_bytes_);
    for (uint8_t& byte : mask_) byte = static_cast<uint8_t>(rng() | rng());
  }

  const AttentionDesc& desc() const { return desc_; }

  AttentionPlan plan(const PlanTraits& traits) const {
    AttentionBatch batch;
    batch.batch_size = static_cast<int>(seq_lens_.size());
    batch.cu_seqlens_q = cu_q_.data();
    if (desc_.block_size > 0) {
      batch.seq_lens = seq_lens_.data();
      batch.block_table = table_.data();
      batch.block_table_stride = batch.max_blocks = max_blocks_;
    } else {
      batch.cu_seqlens_k = cu_k_.data();
    }
    return quire::plan(desc_, batch, traits);
  }

  // `work` runs the list.
  Result run(const AttentionPlan& plan,
             const std::function<void(const AttentionPlan&, const AttentionParams&)>& work) {
    const int64_t rows = int64_t{total_q()} * desc_.num_heads;
    Result result{Array(desc_.dtype, rows * desc_.head_dim_v, kNaN), std::vector<float>(rows, 7)};
    AttentionParams p{};
    p.num_heads = desc_.num_heads;
    p.num_kv_heads = desc_.num_kv_heads;
    p.head_dim = desc_.head_dim;
    p.head_dim_v = desc_.head_dim_v;
    p.dtype = element_type(desc_.dtype);
    p.kv_dtype = element_type(desc_.kv_dtype);
    p.scale = desc_.scale;
    p.softcap = desc_.softcap;
    p.window_left = desc_.window_left;
    p.window_right = desc_.causal ? 0 : desc_.window_right;
    p.sequences = plan.sequences.data();
    p.block_table = desc_.block_size > 0 ? plan.block_ids.data() : nullptr;
    p.block_table_stride = 1;
    p.block_size = desc_.block_size;
    p.q = q_.data();
    p.k = k_.elements.data();
    p.v = v_.elements.data();
    p.k_scale = scale_of(k_);
    p.v_scale = scale_of(v_);
    p.out = result.out.data();
    p.lse = result.lse.data();
    p.q_stride_row = int64_t{desc_.num_heads} * desc_.head_dim;
    p.q_stride_head = desc_.head_dim;
    std::tie(p.k_stride_block, p.k_stride_row, p.k_stride_head) = strides(desc_.head_dim);
    std::tie(p.v_stride_block, p.v_stride_row, p.v_stride_head) = strides(desc_.head_dim_v);
    p.out_stride_row = int64_t{desc_.num_heads} * desc_.head_dim_v;
    p.out_stride_head = desc_.head_dim_v;
    p.lse_stride_row = 1;
    p.lse_stride_head = total_q();
    p.alibi_slopes = case_.alibi ? slopes_.data() : nullptr;
    p.sinks = case_.sinks ? sinks_.data() : nullptr;
    p.mask = case_.mask == Mask::kNone ? nullptr : mask_.data();
    p.mask_stride_row = mask_bytes_;
    p.mask_is_tree = case_.mask == Mask::kTree;
    work(plan, p);
    return result;
  }

  // Worst errors of a result against double precision, in units of what the rule allows: at most
  // `factor` times the error of the same computation rounded at each step, and 1e-5. The row sums
  // of out and lse are checked to be 0 and -inf exactly where nothing is seen.
  void check(const Result& result, double factor) {
    if (exact_.empty()) attend();
    double naive_error = 0, error = 0, lse_error = 0;
    for (size_t i = 0; i < exact_.size(); ++i) {
      naive_error = std::max(naive_error, std::abs(naive_[i] - exact_[i]));
      const double e = std::abs(result.out.get(static_cast<int64_t>(i)) - exact_[i]);
      error = e <= error ? error : e;  // NaN stays
    }
    CHECK(error <= factor * naive_error + 1e-5);
    for (size_t i = 0; i < exact_lse_.size(); ++i) {
      if (std::isinf(exact_lse_[i]))
        CHECK(result.lse[i] == -kInf);
      else
        lse_error = std::max(lse_error, std::abs(result.lse[i] - exact_lse_[i]));
    }
    CHECK(lse_error <= 2e-5);
  }

 private:
  // What a key or value is worth is element * scale, of its token or of all.
  struct Cache {
    Array elements;
    std::vector<float> scales;  // [num_blocks, block_size, num_kv_heads], or empty
    float scale;
  };

  int total_q() const { return cu_q_.back(); }

  // So that normal numbers make use of many elements and none is bounded; no power of two.
  float good_scale() const {
    switch (desc_.kv_dtype) {
      case DType::kInt8:
        return 0.05f;
      case DType::kFloat8E4M3:
      case DType::kFloat8E5M2:
        return 0.03f;
      default:
        return 1;
    }
  }
  KvScale scale_of(const Cache& cache) const {
    if (cache.scales.empty()) return {nullptr, 0, 0, 0, cache.scale, false};
    const int64_t heads = desc_.num_kv_heads;
    return {cache.scales.data(), desc_.block_size * heads, heads, 1, 1, true};
  }
  double value(const Cache& cache, int b, int key, int head, int64_t row, int d) const {
    const double element = cache.elements.get(row + d);
    const float scale = cache.scales.empty() ? cache.scale : cache.scales[scale_at(b, key, head)];
    return element * double{scale};
  }
  size_t scale_at(int b, int key, int head) const {
    const int id = table_[b * max_blocks_ + key / desc_.block_size];
    return (int64_t{id} * desc_.block_size + key % desc_.block_size) * desc_.num_kv_heads + head;
  }

  void place_keys() {
    if (desc_.block_size == 0) {
      num_blocks_ = cu_k_.back();  // rows
      return;
    }
    std::mt19937 rng(3);
    for (int length : seq_lens_) max_blocks_ = std::max(max_blocks_, length / desc_.block_size + 2);
    for (int length : seq_lens_) num_blocks_ += length / desc_.block_size + 1;
    std::vector<int> ids(num_blocks_);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), rng);
    std::map<std::pair<int, int>, int> shared;  // group, index -> id
    for (size_t b = 0; b < seq_lens_.size(); ++b)
      for (int i = 0; i < max_blocks_; ++i) {
        if (i * desc_.block_size >= seq_lens_[b]) {
          table_.push_back(-1 - i);
          continue;
        }
        const auto known = shared.try_emplace({group_of(b, i), i}, ids.back());
        if (known.second) ids.pop_back();
        table_.push_back(known.first->second);
      }
  }

  // Of block i: a group of the case, or one of the sequence's own.
  int group_of(size_t b, int i) const {
    if (b < case_.prefixes.size())
      for (const auto& [group, tokens] : case_.prefixes[b])
        if ((i + 1) * desc_.block_size <= tokens) return group;
    return -1 - static_cast<int>(b);
  }

  // block (or row), row, head
  std::tuple<int64_t, int64_t, int64_t> strides(int dim) const {
    const int64_t heads = desc_.num_kv_heads, rows = std::max(1, desc_.block_size);
    if (case_.head_major && desc_.block_size > 0) return {heads * rows * dim, dim, rows * dim};
    return {heads * rows * dim, heads * dim, dim};
  }

  int64_t offset(int b, int key, int kv_head, int dim) const {
    const auto [block, row, head] = strides(dim);
    if (desc_.block_size == 0) return (cu_k_[b] + key) * row + kv_head * head;
    const int id = table_[b * max_blocks_ + key / desc_.block_size];
    return id * block + key % desc_.block_size * row + kv_head * head;
  }

  void fill(Cache& cache, int dim, std::mt19937& rng) {
    std::normal_distribution<float> normal;
    const int64_t rows = int64_t{num_blocks_} * std::max(1, desc_.block_size);
    cache.elements = Array(desc_.kv_dtype, rows * desc_.num_kv_heads * dim, case_.poison);
    if (case_.token_scales) cache.scales.assign(rows * desc_.num_kv_heads, case_.poison);
    for (int b = 0; b < static_cast<int>(seq_lens_.size()); ++b)
      for (int key = 0; key < seq_lens_[b]; ++key)
        for (int head = 0; head < desc_.num_kv_heads; ++head) {
          const float scale = cache.scale * static_cast<float>(1 + (key + head) % 3);
          if (case_.token_scales) cache.scales[scale_at(b, key, head)] = scale;
          const int64_t row = offset(b, key, head, dim);
          for (int d = 0; d < dim; ++d) cache.elements.set(row + d, normal(rng) / cache.scale);
        }
  }

  bool is_seen(int b, int i, int key) const {
    const int position = seq_lens_[b] - (cu_q_[b + 1] - cu_q_[b]) + i;
    const int right = desc_.causal ? 0 : desc_.window_right;
    if (desc_.window_left >= 0 && key < position - desc_.window_left) return false;
    if (right >= 0 && key > position + right) return false;
    if (case_.mask == Mask::kNone) return true;
    const int bit = case_.mask == Mask::kFull ? key : key - (position - i);
    if (bit < 0) return true;
    return mask_[(cu_q_[b] + i) * mask_bytes_ + bit / 8] >> (bit % 8) & 1;
  }

  double logit(int b, int i, int head, int key) const {
    const int kv_head = head / (desc_.num_heads / desc_.num_kv_heads);
    const int64_t q_row = (int64_t{cu_q_[b] + i} * desc_.num_heads + head) * desc_.head_dim;
    const int64_t k_row = offset(b, key, kv_head, desc_.head_dim);
    double x = 0;
    for (int d = 0; d < desc_.head_dim; ++d)
      x += double{q_.get(q_row + d)} * value(k_, b, key, kv_head, k_row, d);
    x *= double{desc_.scale};
    if (desc_.softcap > 0) x = double{desc_.softcap} * std::tanh(x / double{desc_.softcap});
    const int position = seq_lens_[b] - (cu_q_[b + 1] - cu_q_[b]) + i;
    if (case_.alibi) x -= double{slopes_[head]} * std::abs(position - key);
    return x;
  }

  void attend() {
    exact_lse_.resize(static_cast<size_t>(total_q()) * desc_.num_heads);
    for (size_t b = 0; b < seq_lens_.size(); ++b)
      for (int i = 0; i < cu_q_[b + 1] - cu_q_[b]; ++i)
        for (int head = 0; head < desc_.num_heads; ++head) attend_row(static_cast<int>(b), i, head);
  }

  // Appends a row of out, exact and with logits, weights and output rounded.
  void attend_row(int b, int i, int head) {
    const int kv_head = head / (desc_.num_heads / desc_.num_kv_heads);
    std::vector<int> keys;
    std::vector<double> x;
    for (int key = 0; key < seq_lens_[b]; ++key)
      if (is_seen(b, i, key)) keys.push_back(key), x.push_back(logit(b, i, head, key));
    double top = x.empty() ? 0 : *std::max_element(x.begin(), x.end());
    double sum = 0, naive_sum = 0;
    for (double value : x) sum += std::exp(value - top);
    for (double value : x) naive_sum += std::exp(rounded(desc_.dtype, value) - top);
    if (case_.sinks && !x.empty()) {
      sum += std::exp(double{sinks_[head]} - top);
      naive_sum += std::exp(double{sinks_[head]} - top);
    }
    std::vector<double> out(desc_.head_dim_v), naive(desc_.head_dim_v);
    for (size_t j = 0; j < keys.size(); ++j) {
      const int64_t row = offset(b, keys[j], kv_head, desc_.head_dim_v);
      const double p = std::exp(x[j] - top) / sum;
      const double naive_p =
          rounded(desc_.dtype, std::exp(rounded(desc_.dtype, x[j]) - top) / naive_sum);
      for (int d = 0; d < desc_.head_dim_v; ++d) {
        const double v = value(v_, b, keys[j], kv_head, row, d);
        out[d] += p * v;
        naive[d] += naive_p * v;
      }
    }
    exact_.insert(exact_.end(), out.begin(), out.end());
    for (double value : naive) naive_.push_back(double{rounded(desc_.dtype, value)});
    exact_lse_[static_cast<size_t>(head) * total_q() + cu_q_[b] + i] =
        x.empty() ? -double{kInf} : top + std::log(sum);
  }

  Case case_;
  AttentionDesc desc_;
  Array q_;
  Cache k_, v_;
  std::vector<int32_t> cu_q_, cu_k_, seq_lens_, table_;
  int max_blocks_ = 0, num_blocks_ = 0;
  std::vector<float> slopes_, sinks_;
  int64_t mask_bytes_ = 0;
  std::vector<uint8_t> mask_;
  std::vector<double> exact_, naive_, exact_lse_;
};

}  // namespace quire::test
