// SPDX-License-Identifier: Apache-2.0
// append_kv (which also turns queries), copy_blocks and merge_states. All three are bound by
// memory: a thread moves 16 bytes at a time and threads that follow each other move bytes that do.
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

template <class Type>
QUIRE_DEVICE void load_values(float (&values)[kPiece], const uint16_t* from, int columns,
                              bool is_aligned) {
  if (is_aligned && columns >= kPiece) {
    const U32x4 loaded = ld_global(reinterpret_cast<const U32x4*>(from));
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    QUIRE_UNROLL
    for (int i = 0; i < kPiece; ++i)
      values[i] = widen<Type>(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
    return;
  }
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i) values[i] = i < columns ? widen<Type>(ld_global(from + i)) : 0;
}

// Turns (a, b) by an angle, in float32.
QUIRE_DEVICE void rotate(float& a, float& b, float cos, float sin) {
  const float turned = fma(a, cos, -mul(b, sin));
  b = fma(b, cos, mul(a, sin));
  a = turned;
}

// Turns pairs [first, first + 8) of a key. The thread that reads a pair writes it, so a row may be
// turned in place.
template <class Type>
QUIRE_DEVICE void rotate_pairs(const AppendArgs& args, uint16_t* to, const uint16_t* from,
                               int position, int first) {
  const int row_pairs = args.rotary_dim / 2;
  const int pairs = min(kPiece, row_pairs - first);
  float cos[kPiece], sin[kPiece], low[kPiece], high[kPiece];
  const float* angles = args.cos_sin + position * args.cos_sin_stride + first;
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i) {
    cos[i] = i < pairs ? ld_global(angles + i) : 0;
    sin[i] = i < pairs ? ld_global(angles + row_pairs + i) : 0;
  }
  // Where the two pieces of a thread begin, and how many columns each has.
  const int low_column = args.is_interleaved ? 2 * first : first;
  const int high_column = args.is_interleaved ? 2 * first + kPiece : row_pairs + first;
  const int low_count = args.is_interleaved ? min(kPiece, 2 * pairs) : pairs;
  const int high_count = args.is_interleaved ? 2 * pairs - low_count : pairs;
  const bool high_is_aligned = args.is_aligned && high_column % kPiece == 0;
  load_values<Type>(low, from + low_column, low_count, args.is_aligned);
  load_values<Type>(high, from + high_column, high_count, high_is_aligned);
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i) {
    float (&piece)[kPiece] = i < kPiece / 2 ? low : high;
    if (args.is_interleaved)
      rotate(piece[i * 2 % kPiece], piece[i * 2 % kPiece + 1], cos[i], sin[i]);
    else
      rotate(low[i], high[i], cos[i], sin[i]);
  }
  store_piece<Type, Mode::kFull>(to + low_column, low, low_count, args.is_aligned);
  store_piece<Type, Mode::kFull>(to + high_column, high, high_count, high_is_aligned);
}

template <class Type, int kThreads>
QUIRE_DEVICE void append_kv(const AppendArgs& args) {
  const int rotary = args.rotary_dim;
  const int rotated = ceil_div(rotary / 2, kPiece);
  const int k_pieces = rotated + ceil_div(args.k.dim - rotary, kPiece);
  const int pieces = k_pieces + ceil_div(args.v.dim, kPiece);
  for_each<kThreads>(int64_t{args.num_tokens} * args.num_heads * pieces, [&](int64_t i) {
    const int piece = static_cast<int>(i % pieces);
    const int head = static_cast<int>(i / pieces % args.num_heads);
    const int64_t token = i / pieces / args.num_heads;
    const int64_t slot = args.slot_mapping ? ld_global(args.slot_mapping + token) : token;
    const int position = rotary > 0 ? ld_global(args.positions + token) : 0;
    if (slot < 0 || slot >= args.num_slots) return;
    if (rotary > 0 && (position < 0 || position >= args.max_position)) return;
    const AppendArgs::Side& side = piece < k_pieces ? args.k : args.v;
    const uint16_t* from = side.from.at(token, 0, head, 0);
    uint16_t* to =
        side.cache.at(slot / args.block_size, static_cast<int>(slot % args.block_size), head, 0);
    if (piece < rotated) return rotate_pairs<Type>(args, to, from, position, piece * kPiece);
    const int column =
        piece < k_pieces ? rotary + (piece - rotated) * kPiece : (piece - k_pieces) * kPiece;
    copy_piece(to + column, from + column, side.dim - column,
               args.is_aligned && column % kPiece == 0);
  });
}

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
    copy_piece(side.to.at(destination, row, head, column), side.from.at(source, row, head, column),
               side.dim - column, args.is_aligned);
  });
}

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
      float given[kPiece];
      load_values<Type>(given, args.outs.at(state, row, head, column), columns, args.is_aligned);
      QUIRE_UNROLL
      for (int e = 0; e < kPiece; ++e) values[e] = scales.apply(values[e], given[e]);
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
