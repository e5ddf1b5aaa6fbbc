// SPDX-License-Identifier: Apache-2.0
// The gradients of attention: arguments checked, tensors turned into kernel parameters.
#include "quire/attention_backward.h"

#include <string>
#include <vector>

#include "attention/params.h"
#include "check.h"
#include "quire/backend.h"
#include "quire/error.h"

namespace quire {
namespace {

const std::string kFunction = "attention_backward";

// Shapes of the call; dense ones begin with the batch.
struct Shapes {
  Shapes(const AttentionDesc& desc, const AttentionPlan& plan) {
    const int64_t batch = static_cast<int64_t>(plan.sequences.size());
    const auto rows = [&](int64_t count, int64_t heads, int64_t dim) {
      std::vector<Extent> shape = {{"rows", count}, {"heads", heads}, {"head_dim", dim}};
      if (plan.dense) shape.insert(shape.begin(), {"batch", batch});
      return shape;
    };
    q = rows(plan.total_q, desc.num_heads, desc.head_dim);
    out = rows(plan.total_q, desc.num_heads, desc.head_dim_v);
    k = rows(plan.total_k, desc.num_kv_heads, desc.head_dim);
    v = rows(plan.total_k, desc.num_kv_heads, desc.head_dim_v);
    lse = {{"num_heads", desc.num_heads}, {"total_q", plan.total_q}};
    mask = {{"total_q", plan.total_q}, {"bytes"}};
    if (!plan.dense) return;
    lse.insert(lse.begin(), {"batch", batch});
    mask.insert(mask.begin(), {"batch", batch});
  }
  std::vector<Extent> q, out, k, v, lse, mask;
};

void check_mask(const AttentionPlan& plan, const AttentionTensors& t, const Shapes& shapes) {
  check_tensor(kFunction + ": mask", t.mask, shapes.mask, DType::kUInt8, t.q.device);
  const int64_t bytes = t.mask.shape[t.mask.ndim - 1];
  for (const Sequence& sequence : plan.sequences) {
    const int64_t bits = t.mask_is_tree ? sequence.q_len : sequence.seq_len;
    QUIRE_CHECK_ARG(sequence.q_len == 0 || (bits + 7) / 8 <= bytes, kFunction,
                    ": mask: expected at least ", (bits + 7) / 8, " bytes a row for ", bits,
                    " keys, got ", bytes);
  }
}

void check_tensors(const AttentionDesc& desc, const AttentionPlan& plan, const AttentionTensors& t,
                   const AttentionGradients& g) {
  const Shapes shapes(desc, plan);
  const Device device = t.q.device;
  const auto input = [&](const char* name, const TensorView& tensor,
                         const std::vector<Extent>& shape, DType dtype) {
    check_tensor(concat(kFunction, ": ", name), tensor, shape, dtype, device);
  };
  const auto output = [&](const char* name, const TensorView& tensor,
                          const std::vector<Extent>& shape, DType dtype) {
    check_output(concat(kFunction, ": ", name), tensor, shape, dtype, device);
  };
  input("dout", g.dout, shapes.out, desc.dtype);
  input("q", t.q, shapes.q, desc.dtype);
  input("k", t.k, shapes.k, desc.dtype);
  input("v", t.v, shapes.v, desc.dtype);
  input("out", t.out, shapes.out, desc.dtype);
  input("lse", t.lse, shapes.lse, DType::kFloat32);
  const std::vector<Extent> heads = {{"num_heads", desc.num_heads}};
  if (t.alibi_slopes) input("alibi_slopes", t.alibi_slopes, heads, DType::kFloat32);
  if (t.sinks) input("sinks", t.sinks, heads, DType::kFloat32);
  if (t.mask) check_mask(plan, t, shapes);
  output("dq", g.dq, shapes.q, desc.dtype);
  output("dk", g.dk, shapes.k, desc.dtype);
  output("dv", g.dv, shapes.v, desc.dtype);
  QUIRE_CHECK_ARG(static_cast<bool>(t.sinks) == static_cast<bool>(g.dsinks), kFunction,
                  ": dsinks: expected with sinks, and with sinks only");
  if (g.dsinks) output("dsinks", g.dsinks, heads, DType::kFloat32);
}

// Strides [.., rows, heads, dim] of a tensor that is dense (4 dimensions) or ragged.
void set_strides(const TensorView& tensor, int64_t& seq, int64_t& row, int64_t& head) {
  const int n = tensor.ndim;
  seq = n == 4 ? tensor.strides[0] : 0;
  row = tensor.strides[n - 3];
  head = tensor.strides[n - 2];
}

}  // namespace

void attention_backward(const AttentionTensors& tensors, const AttentionGradients& gradients,
                        const AttentionOptions& options, const TensorView& cu_seqlens_q,
                        const TensorView& cu_seqlens_k) {
  const AttentionBatch batch = describe_batch(kFunction, tensors, cu_seqlens_q, cu_seqlens_k);
  const Attention attention(describe_call(tensors, options, false), tensors.q.device);
  const AttentionDesc& desc = attention.desc();
  const AttentionPlan plan = attention.plan(batch);
  check_tensors(desc, plan, tensors, gradients);
  BackwardParams p{};
  p.forward = make_params(desc, plan, tensors);
  p.num_sequences = static_cast<int32_t>(plan.sequences.size());
  p.dout = gradients.dout.data;
  p.dq = gradients.dq.data;
  p.dk = gradients.dk.data;
  p.dv = gradients.dv.data;
  p.dsinks = gradients.dsinks.as<float>();
  set_strides(gradients.dout, p.dout_stride_seq, p.dout_stride_row, p.dout_stride_head);
  set_strides(gradients.dq, p.dq_stride_seq, p.dq_stride_row, p.dq_stride_head);
  set_strides(gradients.dk, p.dk_stride_seq, p.dk_stride_row, p.dk_stride_head);
  set_strides(gradients.dv, p.dv_stride_seq, p.dv_stride_row, p.dv_stride_head);
  backend_of(tensors.q.device.type)->attention_backward(p);
}

}  // namespace quire
