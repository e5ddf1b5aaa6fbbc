// SPDX-License-Identifier: Apache-2.0
// Operations on a paged cache: the checks, then the backend of the tensors' device.
#include "quire/cache_ops.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "quire/backend.h"
#include "quire/error.h"

namespace quire {
namespace {

const Backend& backend_for(const char* function, const Stream& stream) {
  const Backend* backend = backend_of(stream.device.type);
  if (!backend)
    throw Unsupported(concat(function, ": ", to_string(stream.device), ": ", cuda_state()));
  return *backend;
}

// An index array: on the host, or on `device`, where kernels read it by index alone.
void check_indices(const std::string& argument, const TensorView& indices, int64_t num_tokens,
                   DType dtype, Device device) {
  const bool is_on_host = indices.device.type == DeviceType::kCPU;
  check_tensor(argument, indices, {{"num_tokens", num_tokens}}, dtype,
               is_on_host ? Device{} : device);
  if (!is_on_host) check_contiguous(argument, indices);
}

void check_float(const std::string& argument, const TensorView& tensor) {
  QUIRE_CHECK_ARG(is_float(tensor.dtype), argument, ": expected float32, float16 or bfloat16, got ",
                  describe(tensor));
}

// [num_blocks, block_size, num_kv_heads, head_dim] of any float type or a quantised one.
void check_cache(const std::string& argument, const TensorView& cache) {
  QUIRE_CHECK_ARG(cache.ndim == 4 && cache.shape[1] >= 1, argument,
                  ": expected [num_blocks, block_size, num_kv_heads, head_dim], got ",
                  describe(cache));
  QUIRE_CHECK_ARG(is_float(cache.dtype) || is_quantised(cache.dtype), argument,
                  ": expected float32, float16, bfloat16, float8_e4m3, float8_e5m2 or int8, got ",
                  describe(cache));
  check_tensor(argument, cache, {{""}, {""}, {""}, {""}}, cache.dtype, cache.device);
}

void check_caches(const std::string& function, const TensorView& k_cache,
                  const TensorView& v_cache) {
  check_cache(function + ": k_cache", k_cache);
  check_cache(function + ": v_cache", v_cache);
  check_output(function + ": k_cache", k_cache, {{""}, {""}, {""}, {""}}, k_cache.dtype,
               k_cache.device);
  check_output(function + ": v_cache", v_cache,
               {{"num_blocks", k_cache.shape[0]},
                {"block_size", k_cache.shape[1]},
                {"num_kv_heads", k_cache.shape[2]},
                {"head_dim"}},
               k_cache.dtype, k_cache.device);
}

// Scales a token and head are written.
void check_append_scale(const std::string& argument, const TensorView& scale,
                        const TensorView& cache) {
  check_scale(argument, scale, cache);
  if (scale.ndim == 3) check_writable(argument, scale);
}

// Two scales that are written may not be one.
void check_append_scales(const KvScales& scales, const TensorView& k_cache,
                         const TensorView& v_cache) {
  check_append_scale("append_kv: k_scale", scales.k, k_cache);
  check_append_scale("append_kv: v_scale", scales.v, v_cache);
  QUIRE_CHECK_ARG(
      scales.v.ndim != 3 || scales.v.num_elements() == 0 || scales.v.data != scales.k.data,
      "append_kv: v_scale: expected other memory than k_scale, got the same");
}

// x [num_tokens, heads, head_dim] is what the rope turns.
void check_rope(const std::string& function, const Rope& rope, const TensorView& x) {
  const int64_t num_tokens = x.shape[0], head_dim = x.shape[2];
  check_tensor(function + ": rope.cos_sin", rope.cos_sin, {{"max_position"}, {"rotary_dim"}},
               DType::kFloat32, x.device);
  const int64_t max_position = rope.cos_sin.shape[0], rotary_dim = rope.cos_sin.shape[1];
  QUIRE_CHECK_ARG(rotary_dim >= 2 && rotary_dim % 2 == 0 && rotary_dim <= head_dim, function,
                  ": rope.cos_sin: expected an even rotary_dim in [2, ", head_dim,
                  "] (head_dim), got ", describe(rope.cos_sin));
  check_indices(function + ": rope.positions", rope.positions, num_tokens, DType::kInt32, x.device);
  if (rope.positions.device.type != DeviceType::kCPU) return;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int32_t position = rope.positions.as<int32_t>()[t * rope.positions.strides[0]];
    QUIRE_CHECK_ARG(position >= 0 && position < max_position, function, ": rope.positions[", t,
                    "]: expected a row of cos_sin in [0, ", max_position, "), got ", position);
  }
}

// One side of src_dst [n, 2]: block ids, sorted.
std::vector<int32_t> sorted_blocks(const std::string& function, const TensorView& src_dst, int side,
                                   int64_t num_blocks) {
  std::vector<int32_t> blocks(src_dst.shape[0]);
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i] = src_dst.as<int32_t>()[static_cast<int64_t>(i) * src_dst.strides[0] + side];
    QUIRE_CHECK_ARG(blocks[i] >= 0 && blocks[i] < num_blocks, function, ": src_dst[", i, ", ", side,
                    "]: expected a block id in [0, ", num_blocks, "), got ", blocks[i]);
  }
  std::sort(blocks.begin(), blocks.end());
  return blocks;
}

// Copies run in any order, so no block may be written twice.
void check_written_once(const std::string& function, const std::vector<int32_t>& destinations) {
  const auto twice = std::adjacent_find(destinations.begin(), destinations.end());
  QUIRE_CHECK_ARG(twice == destinations.end(), function,
                  ": src_dst: expected each destination once, got block ", *twice, " twice");
}

}  // namespace

void append_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache,
               const TensorView& v_cache, const TensorView& slot_mapping, const Rope* rope,
               const KvScales& scales, void* stream) {
  check_caches("append_kv", k_cache, v_cache);
  const bool quantises = is_quantised(k_cache.dtype);
  if (quantises) check_float("append_kv: k", k);
  const DType dtype = quantises ? k.dtype : k_cache.dtype;
  QUIRE_CHECK_ARG(k.ndim == 3, "append_kv: k: expected [num_tokens, ", k_cache.shape[2], ", ",
                  k_cache.shape[3], "] ", name_of(dtype), ", got ", describe(k));
  const int64_t num_tokens = k.shape[0], num_kv_heads = k_cache.shape[2];
  check_tensor("append_kv: k", k,
               {{"num_tokens"}, {"heads", num_kv_heads}, {"head_dim", k_cache.shape[3]}}, dtype,
               k_cache.device);
  check_tensor(
      "append_kv: v", v,
      {{"num_tokens", num_tokens}, {"heads", num_kv_heads}, {"head_dim", v_cache.shape[3]}}, dtype,
      k_cache.device);
  check_indices("append_kv: slot_mapping", slot_mapping, num_tokens, DType::kInt64, k_cache.device);
  const bool is_on_host = slot_mapping.device.type == DeviceType::kCPU;
  const int64_t num_slots = k_cache.shape[0] * k_cache.shape[1];
  for (int64_t t = 0; is_on_host && t < num_tokens; ++t) {
    const int64_t slot = slot_mapping.as<int64_t>()[t * slot_mapping.strides[0]];
    QUIRE_CHECK_ARG(slot >= -1 && slot < num_slots, "append_kv: slot_mapping[", t,
                    "]: expected -1 (skip) or a slot in [0, ", num_slots, "), got ", slot);
  }
  if (rope) check_rope("append_kv", *rope, k);
  check_append_scales(scales, k_cache, v_cache);
  const Stream where{k_cache.device, stream};
  backend_for("append_kv", where)
      .append_kv(k, v, k_cache, v_cache, slot_mapping, rope, scales, where);
}

void apply_rope(const TensorView& x, const Rope& rope, const TensorView& out, void* stream) {
  QUIRE_CHECK_ARG(x.ndim == 3, "apply_rope: x: expected [num_tokens, heads, head_dim], got ",
                  describe(x));
  check_float("apply_rope: x", x);
  check_tensor("apply_rope: x", x, {{""}, {""}, {""}}, x.dtype, x.device);
  check_output("apply_rope: out", out, {{"", x.shape[0]}, {"", x.shape[1]}, {"", x.shape[2]}},
               x.dtype, x.device);
  QUIRE_CHECK_ARG((out.data == x.data && out.strides == x.strides) || lie_apart(x, out),
                  "apply_rope: out: expected x itself or other memory, got memory that overlaps x");
  check_rope("apply_rope", rope, x);
  const Stream where{x.device, stream};
  backend_for("apply_rope", where).apply_rope(x, rope, out, where);
}

void copy_blocks(const TensorView& k_cache, const TensorView& v_cache, const TensorView& src_dst,
                 void* stream) {
  check_caches("copy_blocks", k_cache, v_cache);
  check_tensor("copy_blocks: src_dst", src_dst, {{"n"}, {"2", 2}}, DType::kInt32);
  const int64_t num_blocks = k_cache.shape[0];
  const std::vector<int32_t> sources = sorted_blocks("copy_blocks", src_dst, 0, num_blocks);
  const std::vector<int32_t> destinations = sorted_blocks("copy_blocks", src_dst, 1, num_blocks);
  check_written_once("copy_blocks", destinations);
  for (int32_t block : destinations)
    QUIRE_CHECK_ARG(!std::binary_search(sources.begin(), sources.end(), block),
                    "copy_blocks: src_dst: expected no destination among the sources, got block ",
                    block);
  const Stream where{k_cache.device, stream};
  backend_for("copy_blocks", where).copy_blocks(k_cache, v_cache, src_dst, where);
}

void swap_blocks(const TensorView& src, const TensorView& dst, const TensorView& src_dst,
                 void* stream) {
  check_cache("swap_blocks: src", src);
  const Stream where{src.device.type == DeviceType::kCPU ? dst.device : src.device, stream};
  const bool is_to_host = dst.device.type == DeviceType::kCPU;
  check_output("swap_blocks: dst", dst,
               {{"num_blocks"}, {"", src.shape[1]}, {"", src.shape[2]}, {"", src.shape[3]}},
               src.dtype, is_to_host ? Device{} : where.device);
  check_tensor("swap_blocks: src_dst", src_dst, {{"n"}, {"2", 2}}, DType::kInt32);
  sorted_blocks("swap_blocks", src_dst, 0, src.shape[0]);
  check_written_once("swap_blocks", sorted_blocks("swap_blocks", src_dst, 1, dst.shape[0]));
  QUIRE_CHECK_ARG(lie_apart(src, dst),
                  "swap_blocks: dst: expected other memory than src, got memory that overlaps it");
  backend_for("swap_blocks", where).swap_blocks(src, dst, src_dst, where);
}

void merge_states(const TensorView& outs, const TensorView& lses, const TensorView& out,
                  const TensorView& lse, void* stream) {
  QUIRE_CHECK_ARG(outs.ndim == 4,
                  "merge_states: outs: expected [n, total_q, num_heads, head_dim], got ",
                  describe(outs));
  check_float("merge_states: outs", outs);
  const int64_t total_q = outs.shape[1], num_heads = outs.shape[2];
  check_tensor("merge_states: outs", outs, {{""}, {""}, {""}, {""}}, outs.dtype, outs.device);
  check_tensor("merge_states: lses", lses,
               {{"n", outs.shape[0]}, {"num_heads", num_heads}, {"total_q", total_q}},
               DType::kFloat32, outs.device);
  check_output("merge_states: out", out,
               {{"total_q", total_q}, {"num_heads", num_heads}, {"head_dim", outs.shape[3]}},
               outs.dtype, outs.device);
  if (lse)
    check_output("merge_states: lse", lse, {{"num_heads", num_heads}, {"total_q", total_q}},
                 DType::kFloat32, outs.device);
  const Stream where{outs.device, stream};
  backend_for("merge_states", where).merge_states(outs, lses, out, lse, where);
}

}  // namespace quire
