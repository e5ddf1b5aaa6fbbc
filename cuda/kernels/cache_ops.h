// SPDX-License-Identifier: Apache-2.0
// append_kv, copy_blocks and merge_states. All three are bound by memory: a thread moves 16 bytes
// at a time and threads that follow each other move bytes that do.
#pragma once

#include "kernels/state.h"

namespace quire::device {

// The unit of 16-bit elements that a thread moves: eight columns of a row.
QUIRE_DEVICE void copy_piece(uint16_t* to, const uint16_t* from, int columns, bool is_aligned) {
  if (is_aligned && columns >= kPiece)
    return st_global(reinterpret_cast<U32x4*>(to), ld_global(reinterpret_cast<const U32x4*>(from)));
  for (int i = 0; i < min(columns, kPiece); ++i) st_global(to + i, ld_global(from + i));
}

// Every thread of the grid calls work(i) for its share of [0, count).
template <int kThreads, class Work>
QUIRE_DEVICE void for_each(int64_t count, Work work) {
  const int64_t stride = int64_t{num_blocks()} * kThreads;
  for (int64_t i = int64_t{block_index()} * kThreads + thread_index(); i < count; i += stride)
    work(i);
}

// A tensor [outer, rows, heads, dim] by strides in elements.
struct CacheView {
  uint16_t* data;
  int64_t stride_outer, stride_row, stride_head;

  QUIRE_DEVICE uint16_t* at(int64_t outer, int row, int head, int column) const {
    return data + outer * stride_outer + row * stride_row + head * stride_head + column;
  }
};

// New rows of K and V to their slots of a paged cache.
struct AppendArgs {
  struct Side {
    CacheView from;   // [tokens, 1, heads, dim]
    CacheView cache;  // [blocks, block_size, heads, dim]
    int32_t dim;
  };
  Side k, v;
  const int64_t* slot_mapping;  // [tokens]: block * block_size + row, or -1: skipped
  int32_t num_tokens, num_heads, block_size;
  bool is_aligned;  // all rows begin at multiples of 16 bytes
};

template <int kThreads>
QUIRE_DEVICE void append_kv(const AppendArgs& args) {
  const int k_pieces = ceil_div(args.k.dim, kPiece);
  const int pieces = k_pieces + ceil_div(args.v.dim, kPiece);
  for_each<kThreads>(int64_t{args.num_tokens} * args.num_heads * pieces, [&](int64_t i) {
    const int piece = static_cast<int>(i % pieces);
    const int head = static_cast<int>(i / pieces % args.num_heads);
    const int64_t token = i / pieces / args.num_heads;
    const int64_t slot = ld_global(args.slot_mapping + token);
    if (slot < 0) return;
    const AppendArgs::Side& side = piece < k_pieces ? args.k : args.v;
    const int column = (piece < k_pieces ? piece : piece - k_pieces) * kPiece;
    copy_piece(side.cache.at(slot / args.block_size, static_cast<int>(slot % args.block_size), head,
                             column),
               side.from.at(token, 0, head, column), side.dim - column, args.is_aligned);
  });
}

struct CopyBlocksArgs {
  struct Side {
    CacheView cache;
    int32_t dim;
  };
  Side k, v;
  const int32_t* pairs;  // [num_pairs, 2]: source, destination; no block is both
  int32_t num_pairs, num_heads, block_size;
  bool is_aligned;
};

template <int kThreads>
QUIRE_DEVICE void copy_blocks(const CopyBlocksArgs& args) {
  const int k_pieces = ceil_div(args.k.dim, kPiece);
  const int pieces = k_pieces + ceil_div(args.v.dim, kPiece);
  const int64_t per_block = int64_t{args.block_size} * args.num_heads * pieces;
  for_each<kThreads>(args.num_pairs * per_block, [&](int64_t i) {
    const int64_t pair = i / per_block, rest = i % per_block;
    const int piece = static_cast<int>(rest % pieces);
    const int head = static_cast<int>(rest / pieces % args.num_heads);
    const int row = static_cast<int>(rest / pieces / args.num_heads);
    const int source = ld_global(args.pairs + 2 * pair);
    const int destination = ld_global(args.pairs + 2 * pair + 1);
    const CopyBlocksArgs::Side& side = piece < k_pieces ? args.k : args.v;
    const int column = (piece < k_pieces ? piece : piece - k_pieces) * kPiece;
    copy_piece(side.cache.at(destination, row, head, column),
               side.cache.at(source, row, head, column), side.dim - column, args.is_aligned);
  });
}

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

template <class Type, int kThreads>
QUIRE_DEVICE void merge_states(const MergeStatesArgs& args) {
  const int pieces = ceil_div(args.dim, kPiece);
  for_each<kThreads>(int64_t{args.num_rows} * args.num_heads * pieces, [&](int64_t i) {
    const int column = static_cast<int>(i % pieces) * kPiece;
    const int head = static_cast<int>(i / pieces % args.num_heads);
    const int row = static_cast<int>(i / pieces / args.num_heads);
    const int columns = min(kPiece, args.dim - column);
    RowStats total;
    float values[kPiece] = {};
    for (int state = 0; state < args.num_states; ++state) {
      const float lse = ld_global(args.lses + state * args.lses_stride_state +
                                  head * args.lses_stride_head + row * args.lses_stride_row);
      if (lse == -kInfinity) continue;  // what an empty state's out holds does not matter
      const FoldScales scales = fold(total, {lse * kLog2E, 1.0f});
      const uint16_t* from = args.outs.at(state, row, head, column);
      QUIRE_UNROLL
      for (int e = 0; e < kPiece; ++e)
        if (e < columns) values[e] = scales.apply(values[e], widen<Type>(ld_global(from + e)));
    }
    const float factor = total.sum > 0 ? rcp(total.sum) : 0.0f;
    QUIRE_UNROLL
    for (float& value : values) value *= factor;
    store_piece<Type, Mode::kFull>(args.out.at(0, row, head, column), values, columns,
                                   args.is_aligned);
    if (args.lse && column == 0)
      st_global(args.lse + head * args.lse_stride_head + row * args.lse_stride_row,
                (total.max + log2(total.sum)) * kLn2);
  });
}

}  // namespace quire::device
