// SPDX-License-Identifier: Apache-2.0
// The argument of every kernel, as the host fills it in.
#pragma once

#include "prim/marks.h"
#include "quire/kernel_params.h"

namespace quire::device {

// Items [begin, end) of a list.
struct ItemRange {
  int32_t begin, end;
};

// A work item as lists have it: its sequence is with it, so that a block waits for one read.
struct ListedItem {
  WorkItem work;
  Sequence sequence;
};

struct AttentionArgs {
  AttentionParams params;  // but for `sequences`
  const ListedItem* items;
  int32_t num_items;
  const ItemRange* range;  // of the items that are meant, where the list was made by the device
  int32_t item_rows;       // of the item that has the most of them
  const MergeItem* merges;
  // Results of chunks of split rows, by slot: unnormalised sums and, in units of log2, their
  // maximum and denominator. kHeadDim is that of the kernel.
  float* partial_values;  // [slots, partial_rows, kHeadDim]
  float* partial_stats;   // [slots, partial_rows, 2]
  int32_t partial_rows;
  uint32_t* counters;  // [merges], zero; every launch leaves them zero
  uint32_t* tickets;   // likewise, one: items that blocks have asked for, where they do
  bool is_aligned;     // rows of q, k, v and out begin at multiples of 16 bytes
  float* totals;       // [blocks, kGlobalBytes / 4], of kernels whose total is not in shared memory
};

// For kernels that bring keys and values by bulk copies. AttentionArgs come first: other kernels
// of the same launch take those alone.
struct BoxedAttentionArgs {
  AttentionArgs attention;
  // k and v as [block or sequence, row, kv head, column], copied in boxes of `box_rows` rows times
  // 64 columns: a power of 2 that divides the block size and is at least 8. 0: no maps, as the
  // tensors do not lend themselves to it.
  int32_t box_rows;
  TensorMap k, v;
};

// What a sequence's rows go through. It is a property of the sequence alone, so that the bits of a
// row do not depend on what else is in the batch.
enum Phase { kWide, kNarrow, kDecode, kNumPhases };

// What a plan has. Items are sorted by phase.
struct PlanCounts {
  ItemRange ranges[kNumPhases];
  int32_t num_items, num_merges, num_partials;
};

// Query rows [q_begin, q_end) of a sequence, the keys that they see, and how those are cut.
struct PlanTile {
  int32_t sequence, q_begin, q_end, kv_begin, kv_end;
  int32_t first_piece, num_pieces, piece_chunks;
  int32_t merge, partial;  // of kv head 0, or -1
};

// A batch whose lengths only the device knows -> its work lists.
struct PlanArgs {
  const int32_t* seq_lens;      // [num_sequences]
  const int32_t* cu_seqlens_q;  // [num_sequences + 1], or null: one query row each
  int32_t num_sequences;
  int32_t max_total_q, max_seq_len;  // lengths beyond them count as these
  // model
  int32_t group, num_kv_heads;  // query heads a kv head
  int32_t window_left, window_right;
  // how the work is cut
  int32_t parallelism;
  int32_t tile_rows;               // query rows
  int64_t decode_rows, wide_rows;  // of a sequence, times group: at most, and at least
  int32_t counters_a_merge;
  int32_t max_tiles;  // what follows has room for
  // results
  ListedItem* items;
  MergeItem* merges;
  uint32_t* counters;  // [merges, counters_a_merge], made zero,
  uint32_t* tickets;   // and so is this one
  PlanCounts* counts;
  // scratch
  int32_t* first_tiles;  // [num_sequences]
  PlanTile* tiles;       // [max_tiles]
};

// A tensor [outer, rows, heads, dim] by strides in elements.
template <class Bits>
struct View {
  Bits* data;
  int64_t stride_outer, stride_row, stride_head;

  QUIRE_DEVICE Bits* at(int64_t outer, int row, int head, int column) const {
    return data + outer * stride_outer + row * stride_row + head * stride_head + column;
  }
};

using CacheView = View<uint16_t>;

// Rows of K and V to their slots of a paged cache, the keys turned by a rope on their way. Turning
// queries is the same with no V, no slots and a block_size of 1.
struct AppendArgs {
  struct Side {
    CacheView from;       // [tokens, 1, heads, dim]
    CacheView cache;      // [blocks, block_size, heads, dim]
    int32_t dim;          // of V: 0 where there is none
    View<uint8_t> codes;  // instead of `cache`: e4m3, divided by `scale`, which is written where
    KvScale scale;        // it is one a token
  };
  Side k, v;
  const int64_t* slot_mapping;  // [tokens]: block * block_size + row; null: token t to slot t
  int64_t num_slots;            // slots outside of [0, num_slots) are skipped
  const float* cos_sin;  // [max_position, rotary_dim] by stride: cosines, then sines; or null
  int64_t cos_sin_stride;
  const int32_t* positions;  // [tokens]; those outside of [0, max_position) are skipped
  int32_t max_position;
  int32_t rotary_dim;  // 0: no rope
  bool is_interleaved;
  int32_t num_tokens, num_heads, block_size;
  bool is_aligned;  // all rows begin at multiples of 16 bytes
};

// Whole blocks inside a cache, or with K alone from one pool to another, in bytes.
struct CopyBlocksArgs {
  struct Side {
    View<uint8_t> from, to;
    int32_t dim;
  };
  Side k, v;
  const int32_t* pairs;  // [num_pairs, 2]: source, destination; no block is both
  int32_t num_pairs, num_heads, block_size;
  bool is_aligned;
};

// States over disjoint keys: normalised outputs and their lse in natural units.
struct MergeStatesArgs {
  CacheView outs;     // [states, rows, heads, dim]
  const float* lses;  // [states, heads, rows] by strides
  int64_t lses_stride_state, lses_stride_head, lses_stride_row;
  CacheView out;  // [1, rows, heads, dim]
  float* lse;     // [heads, rows] by strides, or null
  int64_t lse_stride_head, lse_stride_row;
  int32_t num_states, num_rows, num_heads, dim;
  bool is_aligned;
};

}  // namespace quire::device
