// SPDX-License-Identifier: Apache-2.0
// The C interface of attention and of the cache operations.
#include "quire/attention.h"

#include <utility>

#include "c_api/convert.h"
#include "quire/cache_ops.h"

struct QuireAttention {
  quire::Attention attention;
};
struct QuireAttentionPlan {
  quire::AttentionPlan plan;
};

namespace quire::c {
namespace {

AttentionDesc as_desc(const QuireAttentionDesc& given) {
  AttentionDesc desc;
  desc.num_heads = given.num_heads;
  desc.num_kv_heads = given.num_kv_heads;
  desc.head_dim = given.head_dim;
  desc.head_dim_v = given.head_dim_v;
  desc.dtype = as_dtype("quire_attention_new: dtype", given.dtype);
  desc.kv_dtype = as_dtype("quire_attention_new: kv_dtype", given.kv_dtype);
  desc.block_size = given.block_size;
  desc.causal = given.causal != 0;
  desc.window_left = given.window_left;
  desc.window_right = given.window_right;
  desc.scale = given.scale;
  desc.softcap = given.softcap;
  return desc;
}

AttentionBatch as_batch(const char* argument, const QuireAttentionBatch* batch) {
  const auto given = read_struct<QuireAttentionBatch>(argument, batch, QUIRE_ATTENTION_BATCH_INIT);
  return {.batch_size = given.batch_size,
          .seq_lens = given.seq_lens,
          .cu_seqlens_q = given.cu_seqlens_q,
          .cu_seqlens_k = given.cu_seqlens_k,
          .block_table = given.block_table,
          .block_table_stride = given.block_table_stride,
          .max_blocks = given.max_blocks,
          .dense_q = given.dense_q,
          .dense_k = given.dense_k};
}

AttentionTensors as_tensors(const std::string& function, const QuireAttentionTensors* tensors) {
  const auto given = read_struct<QuireAttentionTensors>((function + ": tensors").c_str(), tensors,
                                                        QUIRE_ATTENTION_TENSORS_INIT);
  const auto required = [&](const char* name, const QuireTensor* tensor) {
    return as_view((function + name).c_str(), tensor);
  };
  const auto optional = [&](const char* name, const QuireTensor* tensor) {
    return as_optional_view((function + name).c_str(), tensor);
  };
  return {.q = required(": q", given.q),
          .k = required(": k", given.k),
          .v = required(": v", given.v),
          .out = required(": out", given.out),
          .lse = optional(": lse", given.lse),
          .alibi_slopes = optional(": alibi_slopes", given.alibi_slopes),
          .sinks = optional(": sinks", given.sinks),
          .mask = optional(": mask", given.mask),
          .mask_is_tree = given.mask_is_tree != 0,
          .scales = {.k = optional(": k_scale", given.k_scale),
                     .v = optional(": v_scale", given.v_scale)},
          .stream = given.stream};
}

AttentionOptions as_options(const char* argument, const QuireAttentionOptions* options) {
  const auto given =
      read_struct<QuireAttentionOptions>(argument, options, QUIRE_ATTENTION_OPTIONS_INIT);
  return {.causal = given.causal != 0,
          .window_left = given.window_left,
          .window_right = given.window_right,
          .scale = given.scale,
          .softcap = given.softcap};
}

}  // namespace
}  // namespace quire::c

using namespace quire::c;

QuireStatus quire_attention_new(const QuireAttentionDesc* desc, QuireAttention** attention) {
  return guard([&] {
    QuireAttention*& out = deref("quire_attention_new: attention", attention);
    const auto given = read_struct<QuireAttentionDesc>("quire_attention_new: desc", desc,
                                                       QUIRE_ATTENTION_DESC_INIT);
    const quire::Device device =
        as_device("quire_attention_new: device_type", given.device_type, given.device_index);
    out = new QuireAttention{quire::Attention(as_desc(given), device)};
  });
}

void quire_attention_delete(QuireAttention* attention) { delete attention; }

QuireStatus quire_attention_explain(const QuireAttention* attention, char* buffer, size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_attention_explain: attention", attention).attention;
    write_string("quire_attention_explain: size", self.explain(), buffer, size);
  });
}

QuireStatus quire_attention_plan(const QuireAttention* attention, const QuireAttentionBatch* batch,
                                 QuireAttentionPlan** plan) {
  return guard([&] {
    const auto& self = deref("quire_attention_plan: attention", attention).attention;
    QuireAttentionPlan*& out = deref("quire_attention_plan: plan", plan);
    out = new QuireAttentionPlan{self.plan(as_batch("quire_attention_plan: batch", batch))};
  });
}

QuireStatus quire_attention_plan_on_device(const QuireAttention* attention,
                                           const QuireAttentionBatch* batch, int32_t max_total_q,
                                           void* stream, QuireAttentionPlan** plan) {
  return guard([&] {
    const auto& self = deref("quire_attention_plan_on_device: attention", attention).attention;
    QuireAttentionPlan*& out = deref("quire_attention_plan_on_device: plan", plan);
    out = new QuireAttentionPlan{self.plan_on_device(
        as_batch("quire_attention_plan_on_device: batch", batch), max_total_q, stream)};
  });
}

void quire_attention_plan_delete(QuireAttentionPlan* plan) { delete plan; }

QuireStatus quire_attention_workspace_size(const QuireAttention* attention,
                                           const QuireAttentionPlan* plan, size_t* bytes) {
  return guard([&] {
    const auto& self = deref("quire_attention_workspace_size: attention", attention).attention;
    const auto& work = deref("quire_attention_workspace_size: plan", plan).plan;
    deref("quire_attention_workspace_size: bytes", bytes) = self.workspace_size(work);
  });
}

QuireStatus quire_attention_run(const QuireAttention* attention, const QuireAttentionPlan* plan,
                                const QuireAttentionTensors* tensors) {
  return guard([&] {
    const auto& self = deref("quire_attention_run: attention", attention).attention;
    const auto& work = deref("quire_attention_run: plan", plan).plan;
    self.run(work, as_tensors("quire_attention_run", tensors));
  });
}

QuireStatus quire_attention_run_part(const QuireAttention* attention,
                                     const QuireAttentionPlan* plan,
                                     const QuireAttentionTensors* tensors, void* workspace,
                                     size_t workspace_size, int32_t ith, int32_t nth) {
  return guard([&] {
    const auto& self = deref("quire_attention_run_part: attention", attention).attention;
    const auto& work = deref("quire_attention_run_part: plan", plan).plan;
    deref("quire_attention_run_part: workspace", static_cast<char*>(workspace));
    self.run_part(work, as_tensors("quire_attention_run_part", tensors),
                  {static_cast<std::byte*>(workspace), workspace_size}, ith, nth);
  });
}

QuireStatus quire_attention(const QuireAttentionTensors* tensors,
                            const QuireAttentionOptions* options, const QuireTensor* cu_seqlens_q,
                            const QuireTensor* cu_seqlens_k) {
  return guard([&] {
    quire::attention(as_tensors("quire_attention", tensors),
                     as_options("quire_attention: options", options),
                     as_optional_view("quire_attention: cu_seqlens_q", cu_seqlens_q),
                     as_optional_view("quire_attention: cu_seqlens_k", cu_seqlens_k));
  });
}

QuireStatus quire_paged_attention(const QuireAttentionTensors* tensors,
                                  const QuireTensor* block_table, const QuireTensor* seq_lens,
                                  const QuireAttentionOptions* options,
                                  const QuireTensor* cu_seqlens_q) {
  return guard([&] {
    quire::paged_attention(as_tensors("quire_paged_attention", tensors),
                           as_view("quire_paged_attention: block_table", block_table),
                           as_view("quire_paged_attention: seq_lens", seq_lens),
                           as_options("quire_paged_attention: options", options),
                           as_optional_view("quire_paged_attention: cu_seqlens_q", cu_seqlens_q));
  });
}

QuireStatus quire_append_kv(const QuireTensor* k, const QuireTensor* v, const QuireTensor* k_cache,
                            const QuireTensor* v_cache, const QuireTensor* slot_mapping,
                            const QuireTensor* k_scale, const QuireTensor* v_scale, void* stream) {
  return guard([&] {
    quire::append_kv(as_view("quire_append_kv: k", k), as_view("quire_append_kv: v", v),
                     as_view("quire_append_kv: k_cache", k_cache),
                     as_view("quire_append_kv: v_cache", v_cache),
                     as_view("quire_append_kv: slot_mapping", slot_mapping), nullptr,
                     {.k = as_optional_view("quire_append_kv: k_scale", k_scale),
                      .v = as_optional_view("quire_append_kv: v_scale", v_scale)},
                     stream);
  });
}

QuireStatus quire_copy_blocks(const QuireTensor* k_cache, const QuireTensor* v_cache,
                              const QuireTensor* src_dst, void* stream) {
  return guard([&] {
    quire::copy_blocks(as_view("quire_copy_blocks: k_cache", k_cache),
                       as_view("quire_copy_blocks: v_cache", v_cache),
                       as_view("quire_copy_blocks: src_dst", src_dst), stream);
  });
}

QuireStatus quire_merge_states(const QuireTensor* outs, const QuireTensor* lses,
                               const QuireTensor* out, const QuireTensor* lse, void* stream) {
  return guard([&] {
    quire::merge_states(as_view("quire_merge_states: outs", outs),
                        as_view("quire_merge_states: lses", lses),
                        as_view("quire_merge_states: out", out),
                        as_optional_view("quire_merge_states: lse", lse), stream);
  });
}
