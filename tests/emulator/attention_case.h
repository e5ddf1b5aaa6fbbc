// SPDX-License-Identifier: Apache-2.0
// AttentionCase: what one attention call is made of. AttentionProblem: a case with data, laid out
// as kernels take it, planned by quire::plan. Whatever must not be read is NaN.
#pragma once

#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "emulator/numbers.h"
#include "emulator/run_kernel.h"
#include "quire/attention.h"

namespace quire::emulator {

enum class Layout { kPaged, kRagged, kDense };
enum class Cache { kNhd, kHnd, kOdd };  // of paged K and V; kOdd: no 16-byte rows anywhere

enum class Codes { kNone, kTensor, kHead, kToken };  // K and V as e4m3, and their scales

struct Lengths {
  int q_len, seq_len;
};

struct AttentionCase {
  Layout layout = Layout::kPaged;
  int num_heads = 4, num_kv_heads = 2;
  int head_dim = 64, head_dim_v = 64;
  int block_size = 16;
  Cache cache = Cache::kNhd;
  std::vector<Lengths> batch = {{1, 40}};
  bool causal = true;
  int window_left = -1, window_right = -1;
  float softcap = 0;
  bool alibi = false, sinks = false;
  bool mask = false, mask_is_tree = false;
  Codes codes = Codes::kNone;
  bool code_queries = false;  // e4m3, too
  bool is_latent = false;     // V is the first head_dim_v columns of K
  int parallelism = 1;        // of the planner: more cuts keys into more work items
};

inline constexpr uint16_t kNan = 0xFFFF;  // in both 16-bit types
inline constexpr uint8_t kNanCode = 0x7F;

class AttentionProblem {
 public:
  AttentionProblem(const AttentionCase& c, bool is_bfloat16, int max_rows, uint32_t seed = 1)
      : c(c), is_bfloat16(is_bfloat16), random_(seed) {
    for (const Lengths& l : c.batch) {
      q_begins_.push_back(q_begins_.back() + l.q_len);
      k_begins_.push_back(k_begins_.back() + l.seq_len);
      seq_lens_.push_back(l.seq_len);
    }
    make_params();
    make_tensors();
    make_plan(max_rows);
  }

  double q(int b, int i, int head, int d) const {
    const int64_t at = q_offset(b, i, head) + d;
    return c.code_queries ? e4m3_table()[q_codes_[at]] : value(q_[at]);
  }
  double k(int b, int j, int head, int d) const {
    const int64_t at = k_offset(b, j, head / group()) + d;
    return c.codes == Codes::kNone ? value(k_[at])
                                   : code_value(k_codes_, at, params.k_scale, b, j, head);
  }
  double v(int b, int j, int head, int d) const {
    const int64_t at = v_offset(b, j, head / group()) + d;
    if (c.is_latent) return value(k_[at]);
    return c.codes == Codes::kNone ? value(v_[at])
                                   : code_value(v_codes_, at, params.v_scale, b, j, head);
  }
  // What multiplies the weight of a key rather than the sum of all.
  double v_token_scale(int b, int j, int head) const {
    if (c.codes != Codes::kToken) return 1;
    return params.v_scale.values[scale_offset(params.v_scale, b, j, head / group())];
  }
  double out(int b, int i, int head, int d) const {
    return value(out_[out_offset(b, i, head) + d]);
  }
  float lse(int b, int i, int head) const { return lse_[head * total_q() + q_begins_[b] + i]; }
  float slope(int head) const { return c.alibi ? slopes_[head] : 0; }
  float sink(int head) const { return sinks_[head]; }
  bool mask_bit(int b, int i, int bit) const {
    return mask_[(q_begins_[b] + i) * mask_bytes_ + bit / 8] >> bit % 8 & 1;
  }
  const std::vector<uint16_t>& out_bits() const { return out_; }
  const std::vector<float>& lse_values() const { return lse_; }
  int group() const { return c.num_heads / c.num_kv_heads; }
  int total_q() const { return q_begins_.back(); }

  // Tensors that kernels may touch.
  GlobalMemory global() const {
    GlobalMemory memory;
    const auto allow = [&memory](const auto& array) {
      memory.allow(array.data(), array.size() * sizeof(array[0]));
    };
    allow(q_), allow(k_), allow(v_), allow(out_), allow(lse_), allow(slopes_), allow(sinks_);
    allow(mask_), allow(k_codes_), allow(v_codes_), allow(k_scales_), allow(v_scales_);
    allow(q_codes_);
    return memory;
  }

  AttentionCase c;
  bool is_bfloat16;
  AttentionParams params{};
  AttentionPlan plan;
  Workspace workspace;

 private:
  float value(uint16_t bits) const {
    return is_bfloat16 ? widen_bfloat16(bits) : widen_float16(bits);
  }
  uint16_t draw() {
    const float x = normal_(random_);
    return is_bfloat16 ? narrow_bfloat16(x) : narrow_float16(x);
  }

  // Where the scale of a token lies, by the strides that the kernel is given.
  int64_t scale_offset(const KvScale& scale, int b, int j, int kv_head) const {
    return table_[b * max_blocks_ + j / c.block_size] * scale.stride_block +
           j % c.block_size * scale.stride_row + kv_head * scale.stride_head;
  }
  double code_value(const std::vector<uint8_t>& codes, int64_t at, const KvScale& scale, int b,
                    int j, int head) const {
    const float own =
        scale.values ? scale.values[scale_offset(scale, b, j, head / group())] : scale.value;
    return double{widen_float16(widen_e4m3(codes[at]))} * own;
  }

  int64_t q_offset(int b, int i, int head) const {
    return (q_begins_[b] + i) * params.q_stride_row + head * params.q_stride_head;
  }
  int64_t out_offset(int b, int i, int head) const {
    return (q_begins_[b] + i) * params.out_stride_row + head * params.out_stride_head;
  }
  // A dense tensor is a ragged one of equal lengths, so both are found by rows.
  int64_t k_offset(int b, int j, int head) const {
    if (c.layout != Layout::kPaged)
      return (k_begins_[b] + j) * params.k_stride_row + head * params.k_stride_head;
    return table_[b * max_blocks_ + j / c.block_size] * params.k_stride_block +
           j % c.block_size * params.k_stride_row + head * params.k_stride_head;
  }
  int64_t v_offset(int b, int j, int head) const {
    if (c.layout != Layout::kPaged)
      return (k_begins_[b] + j) * params.v_stride_row + head * params.v_stride_head;
    return table_[b * max_blocks_ + j / c.block_size] * params.v_stride_block +
           j % c.block_size * params.v_stride_row + head * params.v_stride_head;
  }

  void make_params() {
    AttentionParams& p = params;
    p.num_heads = c.num_heads;
    p.num_kv_heads = c.num_kv_heads;
    p.head_dim = c.head_dim;
    p.head_dim_v = c.head_dim_v;
    p.dtype = is_bfloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
    p.scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
    p.softcap = c.softcap;
    p.window_left = c.window_left;
    p.window_right = c.causal ? 0 : c.window_right;
    p.block_size = c.layout == Layout::kPaged ? c.block_size : 0;
    p.block_table_stride = 1;
    const int odd = c.cache == Cache::kOdd ? 3 : 0;
    const auto set = [&](int heads, int dim, int64_t& row, int64_t& head) {
      head = dim + odd;
      row = heads * head;
    };
    set(c.num_heads, c.head_dim, p.q_stride_row, p.q_stride_head);
    set(c.num_heads, c.head_dim_v, p.out_stride_row, p.out_stride_head);
    set(c.num_kv_heads, c.head_dim, p.k_stride_row, p.k_stride_head);
    set(c.num_kv_heads, c.is_latent ? c.head_dim : c.head_dim_v, p.v_stride_row, p.v_stride_head);
    if (c.layout == Layout::kPaged) {
      p.k_stride_block = c.block_size * p.k_stride_row;
      p.v_stride_block = c.block_size * p.v_stride_row;
      if (c.cache == Cache::kHnd) {
        p.k_stride_row = p.k_stride_head, p.k_stride_head *= c.block_size;
        p.v_stride_row = p.v_stride_head, p.v_stride_head *= c.block_size;
      }
    } else if (c.layout == Layout::kDense) {
      const auto [q_len, seq_len] = c.batch[0];
      p.q_stride_seq = q_len * p.q_stride_row;
      p.out_stride_seq = q_len * p.out_stride_row;
      p.k_stride_seq = seq_len * p.k_stride_row;
      p.v_stride_seq = seq_len * p.v_stride_row;
      p.lse_stride_seq = q_len;
    }
    p.lse_stride_row = 1;
    p.lse_stride_head = total_q();
  }

  // Blocks in random order, three more than needed; unused table entries are garbage.
  int64_t make_table() {
    for (int seq_len : seq_lens_) max_blocks_ = std::max(max_blocks_, num_blocks_of(seq_len));
    max_blocks_ += 2;
    table_.assign(c.batch.size() * max_blocks_, -1);
    int used = 0;
    for (int seq_len : seq_lens_) used += num_blocks_of(seq_len);
    std::vector<int> ids(used + 3);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin() + 1, ids.end(), random_);
    // Keys that are not there are located in block 0: it is of no sequence and holds NaN.
    int next = 1;
    for (size_t b = 0; b < seq_lens_.size(); ++b)
      for (int i = 0; i < num_blocks_of(seq_lens_[b]); ++i)
        table_[b * max_blocks_ + i] = ids[next++];
    return static_cast<int64_t>(ids.size());
  }
  int num_blocks_of(int seq_len) const { return (seq_len + c.block_size - 1) / c.block_size; }

  void make_tensors() {
    const bool paged = c.layout == Layout::kPaged;
    const int64_t blocks = paged ? make_table() : 0;
    const int64_t keys = k_begins_.back();
    q_.assign(total_q() * params.q_stride_row, kNan);
    if (c.code_queries) q_codes_.assign(q_.size(), kNanCode);
    out_.assign(total_q() * params.out_stride_row, kNan);
    k_.assign(paged ? blocks * params.k_stride_block : keys * params.k_stride_row, kNan);
    v_.assign(paged ? blocks * params.v_stride_block : keys * params.v_stride_row, kNan);
    if (c.codes != Codes::kNone) make_codes(blocks);
    for (size_t b = 0; b < c.batch.size(); ++b) fill_sequence(static_cast<int>(b));
    lse_.assign(total_q() * c.num_heads, 777.0f);
    for (int head = 0; head < c.num_heads; ++head) {
      slopes_.push_back(std::exp2(-1.0f - head));
      sinks_.push_back(normal_(random_));
    }
    int most_bits = 1;
    for (const Lengths& l : c.batch)
      most_bits = std::max(most_bits, c.mask_is_tree ? l.q_len : l.seq_len);
    mask_bytes_ = most_bits / 8 + 1;
    mask_.resize(total_q() * mask_bytes_);
    for (uint8_t& byte : mask_) byte = static_cast<uint8_t>(random_() | random_());
    point_at_tensors();
  }

  // Of K and V, instead of what k_ and v_ hold; scales of tokens differ by powers of two.
  void make_codes(int64_t blocks) {
    k_codes_.assign(k_.size(), kNanCode), v_codes_.assign(v_.size(), kNanCode);
    const int64_t heads = c.num_kv_heads;
    const int64_t count = c.codes == Codes::kToken  ? blocks * c.block_size * heads
                          : c.codes == Codes::kHead ? heads
                                                    : 0;
    k_scales_.assign(count, NAN), v_scales_.assign(count, NAN);
    const auto make = [&](std::vector<float>& scales, float value) {
      KvScale scale{count > 0 ? scales.data() : nullptr, 0, 0, 0, value, c.codes == Codes::kToken};
      if (count > 0) scale.stride_head = 1;
      if (scale.is_per_token) scale.stride_row = heads, scale.stride_block = c.block_size * heads;
      for (int64_t i = 0; c.codes == Codes::kHead && i < heads; ++i) scales[i] = value * (i + 1);
      return scale;
    };
    params.k_scale = make(k_scales_, 0.01f), params.v_scale = make(v_scales_, 0.02f);
    params.kv_dtype = ElementType::kFloat8E4M3;
  }
  void fill_codes(int b, int j, int head) {
    if (c.codes == Codes::kToken) {
      const auto draw_scale = [&] {
        return std::exp2(static_cast<float>(random_() % 12) - 13.0f) * 1.3f;
      };
      k_scales_[scale_offset(params.k_scale, b, j, head)] = draw_scale();
      v_scales_[scale_offset(params.v_scale, b, j, head)] = draw_scale();
    }
    for (int d = 0; d < c.head_dim; ++d)
      k_codes_[k_offset(b, j, head) + d] = narrow_e4m3(100 * normal_(random_));
    for (int d = 0; d < c.head_dim_v; ++d)
      v_codes_[v_offset(b, j, head) + d] = narrow_e4m3(100 * normal_(random_));
  }

  void fill_sequence(int b) {
    const auto [q_len, seq_len] = c.batch[b];
    for (int i = 0; i < q_len; ++i)
      for (int head = 0; head < c.num_heads; ++head)
        for (int d = 0; d < c.head_dim; ++d)
          if (c.code_queries)
            q_codes_[q_offset(b, i, head) + d] = narrow_e4m3(normal_(random_));
          else
            q_[q_offset(b, i, head) + d] = draw();
    for (int j = 0; j < seq_len; ++j)
      for (int head = 0; head < c.num_kv_heads; ++head) {
        if (c.codes != Codes::kNone) {
          fill_codes(b, j, head);
          continue;
        }
        for (int d = 0; d < c.head_dim; ++d) k_[k_offset(b, j, head) + d] = draw();
        for (int d = 0; d < c.head_dim_v && !c.is_latent; ++d)
          v_[v_offset(b, j, head) + d] = draw();
      }
  }

  void point_at_tensors() {
    AttentionParams& p = params;
    const bool has_codes = c.codes != Codes::kNone;
    p.q = c.code_queries ? static_cast<const void*>(q_codes_.data()) : q_.data();
    p.k = has_codes ? static_cast<const void*>(k_codes_.data()) : k_.data();
    p.v = has_codes ? static_cast<const void*>(v_codes_.data()) : v_.data();
    if (c.is_latent) p.v = p.k;
    p.out = out_.data(), p.lse = lse_.data();
    p.alibi_slopes = c.alibi ? slopes_.data() : nullptr;
    p.sinks = c.sinks ? sinks_.data() : nullptr;
    p.mask = c.mask ? mask_.data() : nullptr;
    p.mask_is_tree = c.mask_is_tree;
    p.mask_stride_row = mask_bytes_;
    if (c.layout == Layout::kDense) p.mask_stride_seq = c.batch[0].q_len * mask_bytes_;
  }

  void make_plan(int max_rows) {
    AttentionDesc desc;
    desc.num_heads = c.num_heads;
    desc.num_kv_heads = c.num_kv_heads;
    desc.head_dim = c.head_dim;
    desc.head_dim_v = c.head_dim_v;
    desc.dtype = desc.kv_dtype = is_bfloat16 ? DType::kBFloat16 : DType::kFloat16;
    desc.block_size = params.block_size;
    desc.causal = c.causal;
    desc.window_left = c.window_left;
    desc.window_right = c.window_right;
    AttentionBatch batch;
    batch.batch_size = static_cast<int>(c.batch.size());
    if (c.layout == Layout::kDense) {
      batch.dense_q = c.batch[0].q_len;
      batch.dense_k = c.batch[0].seq_len;
    } else {
      batch.cu_seqlens_q = q_begins_.data();
      if (c.layout == Layout::kRagged) batch.cu_seqlens_k = k_begins_.data();
    }
    if (c.layout == Layout::kPaged) {
      batch.seq_lens = seq_lens_.data();
      batch.block_table = table_.data();
      batch.block_table_stride = batch.max_blocks = max_blocks_;
    }
    plan = quire::plan(desc, batch, {c.parallelism, max_rows});
    params.sequences = plan.sequences.data();
    params.block_table = params.block_size > 0 ? plan.block_ids.data() : nullptr;
  }

  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::vector<int32_t> q_begins_ = {0}, k_begins_ = {0}, seq_lens_;
  std::vector<int32_t> table_;
  int max_blocks_ = 0;
  std::vector<uint16_t> q_, k_, v_, out_;
  std::vector<uint8_t> q_codes_, k_codes_, v_codes_;
  std::vector<float> k_scales_, v_scales_;
  std::vector<float> lse_, slopes_, sinks_;
  std::vector<uint8_t> mask_;
  int64_t mask_bytes_ = 0;
};

}  // namespace quire::emulator
