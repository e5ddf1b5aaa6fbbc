// SPDX-License-Identifier: Apache-2.0
// Attention: validate, plan and dispatch tied together, and tensors turned into kernel parameters.
#include "quire/attention.h"

#include <cmath>
#include <string>

#include "attention/params.h"
#include "check.h"
#include "quire/backend.h"
#include "quire/error.h"

namespace quire {
namespace {

// Stride of dimension `index`, counted from the last one; 0 where the tensor has none.
int64_t stride_from_end(const TensorView& tensor, int index) {
  return tensor.ndim > index ? tensor.strides[tensor.ndim - 1 - index] : 0;
}

void set_strides(const AttentionDesc& desc, const AttentionTensors& t, AttentionParams& p) {
  // [.., rows, heads, dim]: what comes before rows is the batch (dense) or the block (paged).
  const bool paged = desc.block_size > 0;
  p.q_stride_seq = stride_from_end(t.q, 3);
  p.q_stride_row = stride_from_end(t.q, 2);
  p.q_stride_head = stride_from_end(t.q, 1);
  p.out_stride_seq = stride_from_end(t.out, 3);
  p.out_stride_row = stride_from_end(t.out, 2);
  p.out_stride_head = stride_from_end(t.out, 1);
  (paged ? p.k_stride_block : p.k_stride_seq) = stride_from_end(t.k, 3);
  p.k_stride_row = stride_from_end(t.k, 2);
  p.k_stride_head = stride_from_end(t.k, 1);
  (paged ? p.v_stride_block : p.v_stride_seq) = stride_from_end(t.v, 3);
  p.v_stride_row = stride_from_end(t.v, 2);
  p.v_stride_head = stride_from_end(t.v, 1);
  p.lse_stride_seq = stride_from_end(t.lse, 2);
  p.lse_stride_head = stride_from_end(t.lse, 1);
  p.lse_stride_row = stride_from_end(t.lse, 0);
  p.mask_stride_seq = stride_from_end(t.mask, 2);
  p.mask_stride_row = stride_from_end(t.mask, 1);
}

}  // namespace

AttentionParams make_params(const AttentionDesc& desc, const AttentionPlan& plan,
                            const AttentionTensors& t) {
  AttentionParams p{};
  p.num_heads = desc.num_heads;
  p.num_kv_heads = desc.num_kv_heads;
  p.head_dim = desc.head_dim;
  p.head_dim_v = desc.value_dim();
  p.dtype = element_type(desc.dtype);
  p.kv_dtype = element_type(desc.kv_dtype);
  p.scale = desc.scale != 0 ? desc.scale : 1.0f / std::sqrt(static_cast<float>(desc.head_dim));
  p.softcap = desc.softcap;
  p.window_left = desc.window_left;
  p.window_right = desc.causal ? 0 : desc.window_right;
  p.sequences = plan.sequences.data();
  p.block_table = desc.block_size > 0 ? plan.block_ids.data() : nullptr;
  p.block_table_stride = 1;  // Sequence::kv_row is the index of its first block id
  p.block_size = desc.block_size;
  p.q = t.q.data;
  p.k = t.k.data;
  p.v = t.v.data;
  p.out = t.out.data;
  p.lse = t.lse.as<float>();
  p.alibi_slopes = t.alibi_slopes.as<float>();
  p.sinks = t.sinks.as<float>();
  p.mask = t.mask.as<uint8_t>();
  p.mask_is_tree = t.mask_is_tree;
  p.k_scale = kernel_scale(t.scales.k);
  p.v_scale = kernel_scale(t.scales.v);
  set_strides(desc, t, p);
  return p;
}

AttentionDesc describe_call(const AttentionTensors& t, const AttentionOptions& options,
                            bool paged) {
  AttentionDesc desc;
  desc.num_heads = static_cast<int>(t.q.shape[t.q.ndim - 2]);
  desc.num_kv_heads = static_cast<int>(t.k.shape[t.k.ndim - 2]);
  desc.head_dim = static_cast<int>(t.q.shape[t.q.ndim - 1]);
  desc.head_dim_v = static_cast<int>(t.v.shape[t.v.ndim - 1]);
  desc.dtype = t.q.dtype;
  desc.kv_dtype = t.k.dtype;
  desc.block_size = paged ? static_cast<int>(t.k.shape[1]) : 0;
  desc.causal = options.causal;
  desc.window_left = options.window_left;
  desc.window_right = options.window_right;
  desc.scale = options.scale;
  desc.softcap = options.softcap;
  return desc;
}

namespace {

void check_ndim(const std::string& argument, const TensorView& tensor, int ndim) {
  QUIRE_CHECK_ARG(tensor.ndim == ndim, argument, ": expected ", ndim, " dimensions, got ",
                  describe(tensor));
}

void check_index(const std::string& argument, const TensorView& tensor,
                 const std::vector<Extent>& shape) {
  check_tensor(argument, tensor, shape, DType::kInt32);
  check_contiguous(argument, tensor);
}

}  // namespace

Attention::Attention(const AttentionDesc& desc, Device device) : desc_(desc), device_(device) {
  validate(desc_);
  desc_.head_dim_v = desc_.value_dim();
  const Backend* backend = backend_of(device.type);
  dispatch_ =
      dispatch(desc_, backend ? backend->device_info(device.index) : DeviceInfo{device, "", 1});
  if (!dispatch_.backend)
    throw Unsupported(
        concat("no attention kernel for this on ", to_string(device), ":\n", dispatch_.explain()));
}

AttentionPlan Attention::plan(const AttentionBatch& batch) const {
  const Backend& backend = *dispatch_.backend;
  AttentionPlan plan =
      quire::plan(desc_, batch, backend.plan_traits(desc_, backend.device_info(device_.index)));
  plan.device = device_;
  plan.on_device = backend.prepare(desc_, plan, device_);
  return plan;
}

AttentionPlan Attention::plan_on_device(const AttentionBatch& batch, int max_total_q,
                                        void* stream) const {
  QUIRE_CHECK_ARG(desc_.block_size > 0, "plan: expected an Attention with a block_size");
  QUIRE_CHECK_ARG(batch.batch_size >= 0 && batch.max_blocks >= 0 && max_total_q >= 0,
                  "plan: expected a batch_size, max_blocks and max_total_q of at least 0, got ",
                  batch.batch_size, ", ", batch.max_blocks, " and ", max_total_q);
  QUIRE_CHECK_ARG(batch.seq_lens || batch.batch_size == 0, "plan: seq_lens: expected [",
                  batch.batch_size, "], got a null one");
  QUIRE_CHECK_ARG(batch.block_table || batch.batch_size == 0 || batch.max_blocks == 0,
                  "plan: block_table: expected block ids, got a null one");
  QUIRE_CHECK_ARG(batch.cu_seqlens_q || max_total_q == batch.batch_size,
                  "plan: max_total_q: expected ", batch.batch_size,
                  " (batch_size) without cu_seqlens_q, got ", max_total_q);
  AttentionPlan plan;
  plan.desc = desc_;
  plan.device = device_;
  plan.total_q = max_total_q;
  plan.total_k = int64_t{batch.max_blocks} * desc_.block_size;
  plan.made_on_device = true;
  plan.on_device = dispatch_.backend->plan_on_device(desc_, batch, max_total_q, {device_, stream});
  return plan;
}

void Attention::run(const AttentionPlan& plan, const AttentionTensors& tensors) const {
  validate(desc_, plan, tensors);
  check_device(plan, tensors);
  if (plan.items.empty() && !plan.made_on_device) return;
  dispatch_.backend->run(plan, make_params(desc_, plan, tensors), {device_, tensors.stream});
}

void Attention::run_part(const AttentionPlan& plan, const AttentionTensors& tensors,
                         std::span<std::byte> workspace, int ith, int nth) const {
  QUIRE_CHECK_ARG(nth >= 1, "run_part: nth: expected at least 1, got ", nth);
  QUIRE_CHECK_ARG(ith >= 0 && ith < nth, "run_part: ith: expected 0 to ", nth - 1, ", got ", ith);
  const size_t size = workspace_size(plan);
  QUIRE_CHECK_ARG(workspace.size() >= size, "run_part: workspace: expected at least ", size,
                  " bytes, got ", workspace.size());
  QUIRE_CHECK_ARG(reinterpret_cast<uintptr_t>(workspace.data()) % alignof(float) == 0,
                  "run_part: workspace: expected an address aligned to ", alignof(float), " bytes");
  validate(desc_, plan, tensors);
  check_device(plan, tensors);
  if (plan.items.empty()) return;
  dispatch_.backend->run_part(plan, make_params(desc_, plan, tensors), workspace, nth);
}

void Attention::check_device(const AttentionPlan& plan, const AttentionTensors& tensors) const {
  QUIRE_CHECK_ARG(plan.device == device_, "attention: plan: expected one for ", to_string(device_),
                  ", got one for ", to_string(plan.device));
  QUIRE_CHECK_ARG(tensors.q.device == device_, "attention: q: expected a tensor on ",
                  to_string(device_), ", got ", describe(tensors.q));
}

size_t Attention::workspace_size(const AttentionPlan& plan) const {
  return dispatch_.backend->workspace_size(desc_, plan);
}

AttentionBatch describe_batch(const std::string& function, const AttentionTensors& tensors,
                              const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k) {
  const bool ragged = static_cast<bool>(cu_seqlens_q);
  QUIRE_CHECK_ARG(ragged == static_cast<bool>(cu_seqlens_k), function,
                  ": cu_seqlens_q, cu_seqlens_k: expected both or none");
  const int ndim = ragged ? 3 : 4;
  check_ndim(function + ": q", tensors.q, ndim);
  check_ndim(function + ": k", tensors.k, ndim);
  check_ndim(function + ": v", tensors.v, ndim);
  AttentionBatch batch;
  if (ragged) {
    check_index(function + ": cu_seqlens_q", cu_seqlens_q, {{"batch + 1"}});
    QUIRE_CHECK_ARG(cu_seqlens_q.shape[0] >= 1, function,
                    ": cu_seqlens_q: expected [batch + 1], got an empty one");
    check_index(function + ": cu_seqlens_k", cu_seqlens_k, {{"batch + 1", cu_seqlens_q.shape[0]}});
    batch.batch_size = static_cast<int>(cu_seqlens_q.shape[0] - 1);
    batch.cu_seqlens_q = cu_seqlens_q.as<int32_t>();
    batch.cu_seqlens_k = cu_seqlens_k.as<int32_t>();
  } else {
    batch.batch_size = static_cast<int>(tensors.q.shape[0]);
    batch.dense_q = static_cast<int>(tensors.q.shape[1]);
    batch.dense_k = static_cast<int>(tensors.k.shape[1]);
  }
  return batch;
}

void attention(const AttentionTensors& tensors, const AttentionOptions& options,
               const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k) {
  const AttentionBatch batch = describe_batch("attention", tensors, cu_seqlens_q, cu_seqlens_k);
  const Attention attention(describe_call(tensors, options, false), tensors.q.device);
  attention.run(attention.plan(batch), tensors);
}

void paged_attention(const AttentionTensors& tensors, const TensorView& block_table,
                     const TensorView& seq_lens, const AttentionOptions& options,
                     const TensorView& cu_seqlens_q) {
  check_ndim("paged_attention: q", tensors.q, 3);
  check_ndim("paged_attention: k_cache", tensors.k, 4);
  check_ndim("paged_attention: v_cache", tensors.v, 4);
  QUIRE_CHECK_ARG(tensors.k.shape[1] >= 1,
                  "paged_attention: k_cache: expected a block_size of at least 1, got ",
                  describe(tensors.k));
  check_index("paged_attention: seq_lens", seq_lens, {{"batch"}});
  check_tensor("paged_attention: block_table", block_table,
               {{"batch", seq_lens.shape[0]}, {"max_blocks"}}, DType::kInt32);
  AttentionBatch batch;
  batch.batch_size = static_cast<int>(seq_lens.shape[0]);
  batch.seq_lens = seq_lens.as<int32_t>();
  batch.block_table = block_table.as<int32_t>();
  batch.block_table_stride = block_table.strides[0];
  batch.max_blocks = static_cast<int>(block_table.shape[1]);
  if (cu_seqlens_q) {
    check_index("paged_attention: cu_seqlens_q", cu_seqlens_q,
                {{"batch + 1", seq_lens.shape[0] + 1}});
    batch.cu_seqlens_q = cu_seqlens_q.as<int32_t>();
  }
  const Attention attention(describe_call(tensors, options, true), tensors.q.device);
  attention.run(attention.plan(batch), tensors);
}

}  // namespace quire
