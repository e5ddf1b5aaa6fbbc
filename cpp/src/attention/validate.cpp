// SPDX-License-Identifier: Apache-2.0
// The argument checks of attention: all of them, before any work, each naming what is wrong.
#include <cmath>
#include <limits>
#include <tuple>

#include "attention/tile.h"
#include "check.h"
#include "quire/attention.h"
#include "quire/error.h"

namespace quire {
namespace {

// A plan has items for each kv head: with a bound no wrong count fills the memory.
constexpr int kMaxHeads = 1 << 16;

bool is_paged(const AttentionDesc& desc) { return desc.block_size > 0; }

const char* function_name(const AttentionDesc& desc) {
  return is_paged(desc) ? "paged_attention" : "attention";
}

// "name[index]: expected a count >= 0" for every entry, and cumulative ones never fall.
void check_cumulative(const std::string& argument, const int32_t* values, int count) {
  QUIRE_CHECK_ARG(values[0] == 0, argument, "[0]: expected 0, got ", values[0]);
  for (int i = 0; i < count; ++i)
    QUIRE_CHECK_ARG(values[i + 1] >= values[i], argument, "[", i + 1, "]: expected at least ",
                    values[i], " (the entry before), got ", values[i + 1]);
}

void check_block_table(const AttentionDesc& desc, const AttentionBatch& batch) {
  for (int b = 0; b < batch.batch_size; ++b) {
    const int64_t used = (int64_t{batch.seq_lens[b]} + desc.block_size - 1) / desc.block_size;
    QUIRE_CHECK_ARG(used <= batch.max_blocks, "paged_attention: block_table: expected at least ",
                    used, " blocks a row for seq_lens[", b, "] = ", batch.seq_lens[b],
                    " tokens of block_size ", desc.block_size, ", got ", batch.max_blocks);
    if (used == 0) continue;
    QUIRE_CHECK_ARG(batch.block_table,
                    "paged_attention: block_table: expected block ids, got a null one");
    const int32_t* row = batch.block_table + b * batch.block_table_stride;
    Sequence sequence{};
    sequence.seq_len = batch.seq_lens[b];
    sequence.q_len = batch.cu_seqlens_q ? batch.cu_seqlens_q[b + 1] - batch.cu_seqlens_q[b] : 1;
    for (int64_t i = first_visible_block(desc, sequence); i < used; ++i)
      QUIRE_CHECK_ARG(row[i] >= 0, "paged_attention: block_table[", b, ", ", i,
                      "]: expected a block id >= 0, got ", row[i]);
  }
}

// Shapes that depend on how the batch lies: dense tensors have one dimension more.
std::vector<Extent> with_rows(const AttentionPlan& plan, Extent rows, int64_t heads,
                              int64_t head_dim) {
  if (plan.dense)
    return {{"batch", static_cast<int64_t>(plan.sequences.size())},
            rows,
            {"heads", heads},
            {"head_dim", head_dim}};
  return {rows, {"heads", heads}, {"head_dim", head_dim}};
}

// Rows that are written may not be read afterwards. `out` may be q itself: an item reads its rows
// of q, which no other item writes, before it writes them.
void check_out_apart(const AttentionDesc& desc, const AttentionTensors& t) {
  const bool is_q =
      t.out.data == t.q.data && t.out.strides == t.q.strides && t.out.dtype == t.q.dtype;
  const char* const names[] = {"q", is_paged(desc) ? "k_cache" : "k",
                               is_paged(desc) ? "v_cache" : "v"};
  for (const auto& [name, tensor] :
       {std::pair{names[0], &t.q}, std::pair{names[1], &t.k}, std::pair{names[2], &t.v}})
    QUIRE_CHECK_ARG((tensor == &t.q && is_q) || !share_memory(t.out, *tensor), function_name(desc),
                    ": out: expected memory of its own, got memory that overlaps ", name);
}

// Items, block ids and room for partial results are cut for all of these.
void check_made_for(const AttentionDesc& desc, const AttentionPlan& plan) {
  const AttentionDesc& made = plan.desc;
  const struct {
    const char* name;
    int expected, got;
  } fields[] = {
      {"num_heads", desc.num_heads, made.num_heads},
      {"num_kv_heads", desc.num_kv_heads, made.num_kv_heads},
      {"head_dim", desc.head_dim, made.head_dim},
      {"head_dim_v", desc.value_dim(), made.value_dim()},
      {"block_size", desc.block_size, made.block_size},
      {"causal", desc.causal, made.causal},
      {"window[0]", desc.window_left, made.window_left},
      {"window[1]", desc.window_right, made.window_right},
  };
  for (const auto& field : fields)
    QUIRE_CHECK_ARG(field.expected == field.got, function_name(desc),
                    ": plan: expected one made for ", field.name, " ", field.expected, ", got ",
                    field.got);
  for (const auto& [name, expected, got] : {std::tuple{"dtype", desc.dtype, made.dtype},
                                            std::tuple{"kv_dtype", desc.kv_dtype, made.kv_dtype}})
    QUIRE_CHECK_ARG(expected == got, function_name(desc), ": plan: expected one made for ", name,
                    " ", name_of(expected), ", got ", name_of(got));
}

void check_options(const AttentionDesc& desc, const AttentionPlan& plan,
                   const AttentionTensors& tensors) {
  const std::string function = function_name(desc);
  const Device device = tensors.q.device;
  if (tensors.lse) {
    std::vector<Extent> shape = {{"num_heads", desc.num_heads}, {"total_q", plan.total_q}};
    if (plan.dense)
      shape.insert(shape.begin(), {"batch", static_cast<int64_t>(plan.sequences.size())});
    check_output(function + ": lse", tensors.lse, shape, DType::kFloat32, device);
  }
  for (const auto& [name, tensor] :
       {std::pair{": alibi_slopes", tensors.alibi_slopes}, std::pair{": sinks", tensors.sinks}})
    if (tensor)
      check_tensor(function + name, tensor, {{"num_heads", desc.num_heads}}, DType::kFloat32,
                   device);
  if (!tensors.mask) return;
  std::vector<Extent> shape = {{"total_q", plan.total_q}, {"bytes"}};
  if (plan.dense)
    shape.insert(shape.begin(), {"batch", static_cast<int64_t>(plan.sequences.size())});
  check_tensor(function + ": mask", tensors.mask, shape, DType::kUInt8, device);
  const int64_t bytes = tensors.mask.shape[tensors.mask.ndim - 1];
  const int64_t most = tensors.mask_is_tree ? plan.total_q : plan.total_k;
  QUIRE_CHECK_ARG(!plan.made_on_device || (most + 7) / 8 <= bytes, function,
                  ": mask: expected at least ", (most + 7) / 8, " bytes a row for up to ", most,
                  " keys, got ", bytes);
  for (size_t b = 0; b < plan.sequences.size(); ++b) {
    const Sequence& sequence = plan.sequences[b];
    const int64_t bits = tensors.mask_is_tree ? sequence.q_len : sequence.seq_len;
    QUIRE_CHECK_ARG(sequence.q_len == 0 || (bits + 7) / 8 <= bytes, function,
                    ": mask: expected at least ", (bits + 7) / 8, " bytes a row for the ", bits,
                    " keys of sequence ", b, ", got ", bytes);
  }
}

}  // namespace

void validate(const AttentionDesc& desc) {
  const std::string function = function_name(desc);
  QUIRE_CHECK_ARG(desc.num_heads >= 1 && desc.num_heads <= kMaxHeads, function,
                  ": num_heads: expected 1 to ", kMaxHeads, ", got ", desc.num_heads);
  QUIRE_CHECK_ARG(desc.num_kv_heads >= 1 && desc.num_heads % desc.num_kv_heads == 0, function,
                  ": num_kv_heads: expected a divisor of num_heads (", desc.num_heads, "), got ",
                  desc.num_kv_heads);
  QUIRE_CHECK_ARG(desc.head_dim >= 1, function, ": head_dim: expected at least 1, got ",
                  desc.head_dim);
  QUIRE_CHECK_ARG(desc.head_dim_v >= 0, function, ": head_dim_v: expected at least 1, got ",
                  desc.head_dim_v);
  const bool has_codes = desc.dtype == DType::kFloat8E4M3;
  QUIRE_CHECK_ARG(is_float(desc.dtype) || has_codes, function,
                  ": dtype: expected float32, float16 or bfloat16, got ", name_of(desc.dtype));
  QUIRE_CHECK_ARG(!has_codes || (is_paged(desc) && desc.kv_dtype == DType::kFloat8E4M3), function,
                  ": dtype: expected float8_e4m3 only for paged caches of float8_e4m3, got ",
                  is_paged(desc) ? concat("one of ", name_of(desc.kv_dtype)) : "no cache");
  QUIRE_CHECK_ARG(desc.block_size >= 0, function, ": block_size: expected at least 1, got ",
                  desc.block_size);
  QUIRE_CHECK_ARG(desc.window_left >= -1 && desc.window_right >= -1, function,
                  ": window: expected (left, right), each >= 0 or -1 for open, got (",
                  desc.window_left, ", ", desc.window_right, ")");
  QUIRE_CHECK_ARG(std::isfinite(desc.scale), function, ": scale: expected a finite number, got ",
                  desc.scale);
  QUIRE_CHECK_ARG(std::isfinite(desc.softcap) && desc.softcap >= 0, function,
                  ": softcap: expected a finite number >= 0 (0: none), got ", desc.softcap);
}

void validate(const AttentionDesc& desc, const AttentionBatch& batch) {
  const std::string function = function_name(desc);
  QUIRE_CHECK_ARG(batch.batch_size >= 0, function, ": batch_size: expected at least 0, got ",
                  batch.batch_size);
  if (batch.cu_seqlens_q)
    check_cumulative(function + ": cu_seqlens_q", batch.cu_seqlens_q, batch.batch_size);
  if (is_paged(desc)) {
    QUIRE_CHECK_ARG(batch.seq_lens || batch.batch_size == 0,
                    "paged_attention: seq_lens: expected [", batch.batch_size, "], got a null one");
    for (int b = 0; b < batch.batch_size; ++b)
      QUIRE_CHECK_ARG(batch.seq_lens[b] >= 0, "paged_attention: seq_lens[", b,
                      "]: expected a length >= 0, got ", batch.seq_lens[b]);
    check_block_table(desc, batch);
  } else if (batch.cu_seqlens_k) {
    QUIRE_CHECK_ARG(batch.cu_seqlens_q, "attention: cu_seqlens_q: expected with cu_seqlens_k");
    check_cumulative("attention: cu_seqlens_k", batch.cu_seqlens_k, batch.batch_size);
  } else {
    QUIRE_CHECK_ARG(!batch.cu_seqlens_q, "attention: cu_seqlens_k: expected with cu_seqlens_q");
    QUIRE_CHECK_ARG(batch.dense_q >= 0 && batch.dense_k >= 0,
                    "attention: expected dense lengths or cu_seqlens_q and cu_seqlens_k");
  }
}

void validate(const AttentionDesc& desc, const AttentionPlan& plan,
              const AttentionTensors& tensors) {
  check_made_for(desc, plan);
  const std::string function = function_name(desc);
  const Device device = tensors.q.device;
  const int64_t dim_v = desc.value_dim();
  check_tensor(function + ": q", tensors.q,
               with_rows(plan, {"total_q", plan.total_q}, desc.num_heads, desc.head_dim),
               desc.dtype, device);
  check_output(function + ": out", tensors.out,
               with_rows(plan, {"total_q", plan.total_q}, desc.num_heads, dim_v),
               output_dtype(desc.dtype), device);
  if (is_paged(desc)) {
    const auto cache = [&](int64_t dim, int64_t blocks) {
      return std::vector<Extent>{{"num_blocks", blocks},
                                 {"block_size", desc.block_size},
                                 {"num_kv_heads", desc.num_kv_heads},
                                 {"head_dim", dim}};
    };
    check_tensor(function + ": k_cache", tensors.k, cache(desc.head_dim, -1), desc.kv_dtype,
                 device);
    check_tensor(function + ": v_cache", tensors.v, cache(dim_v, tensors.k.shape[0]), desc.kv_dtype,
                 device);
    QUIRE_CHECK_ARG(plan.max_block_id < tensors.k.shape[0], function,
                    ": block_table: expected block ids in [0, ", tensors.k.shape[0], "), got ",
                    plan.max_block_id);
    check_scale(function + ": k_scale", tensors.scales.k, tensors.k);
    check_scale(function + ": v_scale", tensors.scales.v, tensors.v);
  } else {
    check_tensor(function + ": k", tensors.k,
                 with_rows(plan, {"total_k", plan.total_k}, desc.num_kv_heads, desc.head_dim),
                 desc.kv_dtype, device);
    check_tensor(function + ": v", tensors.v,
                 with_rows(plan, {"total_k", plan.total_k}, desc.num_kv_heads, dim_v),
                 desc.kv_dtype, device);
    QUIRE_CHECK_ARG(!tensors.scales.k && !tensors.scales.v,
                    "attention: k_scale, v_scale: expected none without a paged cache");
  }
  check_options(desc, plan, tensors);
  check_out_apart(desc, tensors);
}

}  // namespace quire
