// SPDX-License-Identifier: Apache-2.0
// What a kernel is given: plain data, read alike by the host, the CPU kernels, the device and the
// emulator. Only <cstdint> may be included here.
//
// A batch is ragged: each sequence owns consecutive rows of q, and its keys lie in a paged cache
// or in rows of k and v. A planner cuts it into WorkItems; a backend runs the list in any order.
#pragma once

#include <cstdint>

namespace quire {

// Keys are reduced in chunks of this many tokens, counted from the start of the sequence. Each
// chunk is reduced on its own and the chunk results are folded left to right, so the bits of a
// row do not depend on how chunks are dealt out to work items, threads or thread blocks.
inline constexpr int32_t kKvChunk = 512;

// One sequence of the batch.
struct Sequence {
  int32_t q_begin;  // first row of q, out, lse and mask
  int32_t q_len;    // query rows; query i is aligned to key seq_len - q_len + i (bottom right)
  int32_t seq_len;  // keys, the new tokens included
  int32_t kv_row;   // paged: row of the block table; else: first row of k and v
};

// The unit of work: some query rows of one sequence, for all query heads that share one kv head,
// against a range of keys.
struct WorkItem {
  int32_t sequence;  // index into AttentionParams::sequences
  int32_t kv_head;
  int32_t q_begin;  // query rows [q_begin, q_end) of the sequence
  int32_t q_end;
  int32_t kv_begin;  // keys [kv_begin, kv_end): begins with a chunk; only the last of the items
  int32_t kv_end;    // that share these rows may end inside one. Empty: no row sees a key
  int32_t partial;   // first slot of this item's partial results (one a chunk, in chunk order),
                     // or -1: the item sees all its keys and writes out and lse itself
  int32_t merge;     // index into AttentionParams::merges, or -1
};

// Query rows whose chunks were dealt to several work items: the last of them to end folds all
// partial results in chunk order.
struct MergeItem {
  int32_t sequence;
  int32_t kv_head;
  int32_t q_begin;
  int32_t q_end;
  int32_t partial;  // first slot
  int32_t num_partials;
  int32_t num_items;  // work items to wait for
};

enum class ElementType : uint8_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat8E4M3,  // k and v, and q over such; the rest k and v only
  kFloat8E5M2,
  kInt8
};

// What the elements of a quantised k or v are multiplied by. The scale of a row of a block, for a
// kv head, is values[block * stride_block + row * stride_row + head * stride_head]; values null:
// `value` for all.
struct KvScale {
  const float* values;
  int64_t stride_block, stride_row, stride_head;
  float value;
  bool is_per_token;  // else both block and row make no difference: their strides are 0
};

// Strides are in elements. Of every tensor the last dimension is contiguous. A `_stride_seq` is
// added once per sequence index: it is how dense batches lie, and 0 for ragged and paged ones.
struct AttentionParams {
  // model
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t head_dim_v;
  ElementType dtype;     // q and out; of e4m3, then of kv_dtype too, out is bfloat16
  ElementType kv_dtype;  // k and v: dtype, or a quantised one
  float scale;           // on q.k
  float softcap;         // 0: none; s: s * tanh(x / s) after the scale, before the mask
  int32_t window_left;   // keys further left than this of the query's own are hidden; -1: open
  int32_t window_right;  // likewise right; causal is 0
  // batch
  const Sequence* sequences;
  const int32_t* block_table;  // [rows, block_table_stride]; null: k and v are rows, not blocks
  int64_t block_table_stride;
  int32_t block_size;  // tokens
  // layer
  const void* q;  // [total_q, num_heads, head_dim]
  const void* k;  // paged [num_blocks, block_size, num_kv_heads, head_dim], else [total_k, ...]
  const void* v;  // likewise, [..., head_dim_v]
  void* out;      // [total_q, num_heads, head_dim_v]
  float* lse;     // [num_heads, total_q] by strides, natural log; or null
  int64_t q_stride_seq, q_stride_row, q_stride_head;
  int64_t k_stride_seq, k_stride_block, k_stride_row, k_stride_head;
  int64_t v_stride_seq, v_stride_block, v_stride_row, v_stride_head;
  int64_t out_stride_seq, out_stride_row, out_stride_head;
  int64_t lse_stride_seq, lse_stride_row, lse_stride_head;
  const float* alibi_slopes;  // [num_heads] or null: adds -slope * |query position - key position|
  const float* sinks;         // [num_heads] or null: one more logit in the denominator
  const uint8_t* mask;        // bits, little endian, row r at mask + r * mask_stride_row; or null
  int64_t mask_stride_seq, mask_stride_row;  // bytes
  bool mask_is_tree;         // bits are for the last q_len keys (all before are seen), else for all
  KvScale k_scale, v_scale;  // of a quantised kv_dtype
};

}  // namespace quire
