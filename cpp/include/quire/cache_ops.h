// SPDX-License-Identifier: Apache-2.0
// Operations on a paged KV cache beside attention. Caches are
// [num_blocks, block_size, num_kv_heads, head_dim] with any strides, the last dimension contiguous.
//
// `stream` is a cudaStream_t, null the default stream, and null on the CPU. slot_mapping and
// positions may be on the host or, contiguous, beside the cache on a GPU. There their values can't
// be checked without waiting: tokens whose slot or position is out of range are skipped.
#pragma once

#include "quire/kv_scales.h"
#include "quire/tensor.h"

namespace quire {

// Rotary position embedding: pair i of the first rotary_dim elements of a head (elements i and
// i + rotary_dim / 2, or 2i and 2i + 1 where interleaved) is turned by the i-th angle of the
// token's position. The elements beyond rotary_dim stay as they are.
struct Rope {
  TensorView cos_sin;    // float32 [max_position, rotary_dim]: a row's cosines, then its sines
  TensorView positions;  // int32 [num_tokens], rows of cos_sin in any order
  bool interleaved = false;
};

// Writes token t of k, v [num_tokens, num_kv_heads, head_dim] into slot slot_mapping[t] =
// block * block_size + offset of the caches; slot -1 is skipped. A rope that is given turns the
// keys on their way, in float32, rounded once.
//
// A quantised cache takes k and v of any float type, each divided by its scale, rounded to nearest
// even and bounded by the largest finite element (int8: 127), in float32. Scales a token and head
// are not read but written: the largest |element| of the row over the largest finite element.
void append_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache,
               const TensorView& v_cache, const TensorView& slot_mapping,
               const Rope* rope = nullptr, const KvScales& scales = {}, void* stream = nullptr);

// x, out [num_tokens, heads, head_dim]: queries, turned as append_kv turns keys. `out` is x itself
// or lies apart.
void apply_rope(const TensorView& x, const Rope& rope, const TensorView& out,
                void* stream = nullptr);

// Copies whole blocks inside the caches: src_dst int32 [n, 2]. Scales a token and head are float32
// caches [num_blocks, block_size, num_kv_heads, 1] to this function. No destination may be a source
// or another's destination.
void copy_blocks(const TensorView& k_cache, const TensorView& v_cache, const TensorView& src_dst,
                 void* stream = nullptr);

// Copies block src_dst[i, 0] of the cache src to block src_dst[i, 1] of dst: another pool with
// blocks of the same shape and dtype, in other memory. No block may be a destination twice. One of
// the two may be on a GPU and the other in pinned memory of the host.
void swap_blocks(const TensorView& src, const TensorView& dst, const TensorView& src_dst,
                 void* stream = nullptr);

// Joins n partial results over disjoint sets of keys: outs [n, total_q, num_heads, head_dim],
// lses float32 [n, num_heads, total_q] (natural log) -> out [total_q, num_heads, head_dim],
// lse [num_heads, total_q] (may be empty). States with lse = -inf do not count, whatever they hold.
void merge_states(const TensorView& outs, const TensorView& lses, const TensorView& out,
                  const TensorView& lse, void* stream = nullptr);

}  // namespace quire
