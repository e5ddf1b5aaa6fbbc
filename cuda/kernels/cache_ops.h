// SPDX-License-Identifier: Apache-2.0
// append_kv (which also turns queries), copy_blocks and merge_states. All three are bound by
// memory: a thread moves 16 bytes at a time and threads that follow each other move bytes that do.
#pragma once

#include "kernels/state.h"

namespace quire::device {

// The unit that a thread moves: 16 bytes of a row, or what there is.
template <class Bits>
QUIRE_DEVICE void copy_piece(Bits* to, const Bits* from, int columns, bool is_aligned) {
  constexpr int kCount = kPieceBytes / sizeof(Bits);
  if (is_aligned && columns >= kCount)
    return st_global(reinterpret_cast<U32x4*>(to), ld_global(reinterpret_cast<const U32x4*>(from)));
  for (int i = 0; i < min(columns, kCount); ++i) st_global(to + i, ld_global(from + i));
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

// To nearest even; beyond the largest: the largest. NaN stays NaN.
QUIRE_DEVICE uint32_t narrow_e4m3(float x) {
  const uint32_t sign = bits_of(x) >> 24 & 0x80, magnitude = bits_of(x) & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7F;
  if (magnitude >= 0x43E00000) return sign | 0x7E;  // 448
  // Below 2^-6 codes are 2^-9 apart, as floats are above 2^14: the sum is rounded like the code.
  if (magnitude < 0x3C800000) return sign | (bits_of(float_of(magnitude) + 16384.0f) & 15);
  const uint32_t rounded = magnitude + 0x7FFFF + (magnitude >> 20 & 1);
  return sign | ((rounded >> 20) - ((127 - 7) << 3));
}

// Columns [column, column + 8) of a row, those of a key turned.
template <class Type>
QUIRE_DEVICE void load_rotated(const AppendArgs& args, float (&values)[kPiece],
                               const uint16_t* from, int column, int columns, int position,
                               bool has_rope) {
  load_values<Type>(values, from + column, columns, args.is_aligned);
  const int row_pairs = args.rotary_dim / 2;
  if (!has_rope || column >= args.rotary_dim) return;
  const float* angles = args.cos_sin + position * args.cos_sin_stride;
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i) {
    const int at = column + i;
    if (i >= columns || at >= args.rotary_dim) continue;
    const bool is_low = args.is_interleaved ? at % 2 == 0 : at < row_pairs;
    const int step = args.is_interleaved ? 1 : row_pairs;
    const int pair = args.is_interleaved ? at / 2 : at % row_pairs;
    const int other = is_low ? at + step : at - step;
    float low = is_low ? values[i] : widen<Type>(ld_global(from + other));
    float high = is_low ? widen<Type>(ld_global(from + other)) : values[i];
    rotate(low, high, ld_global(angles + pair), ld_global(angles + row_pairs + pair));
    values[i] = is_low ? low : high;
  }
}

// The scale that makes the largest magnitude 448. Infinity is taken for the largest float; a row of
// zeros gets a normal number too.
QUIRE_DEVICE float scale_of_row(float top) {
  constexpr float kLargest = 3.40282346638528859812e38f, kLeast = 1.17549435082228750797e-38f;
  return max((top > kLargest ? kLargest : top) / 448.0f, kLeast);
}

QUIRE_DEVICE void store_codes(uint8_t* to, const float (&values)[kPiece], float scale, int columns,
                              bool is_aligned) {
  uint32_t words[2] = {};
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i) words[i / 4] |= narrow_e4m3(values[i] / scale) << (i % 4 * 8);
  if (is_aligned && columns >= kPiece)
    return st_global(reinterpret_cast<U32x2*>(to), U32x2{words[0], words[1]});
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i)
    if (i < columns) st_global(to + i, static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8)));
}

// append_kv to a cache of e4m3: 16 lanes a row, which is turned twice where its own largest
// magnitude makes the scale: once to find it.
template <class Type, int kThreads>
QUIRE_DEVICE void append_kv_e4m3(const AppendArgs& args) {
  constexpr int kLanes = 16;
  const int sides = args.v.dim > 0 ? 2 : 1;
  const int64_t rows = int64_t{args.num_tokens} * args.num_heads * sides;
  const int lane = thread_index() % kLanes;
  const int64_t stride = int64_t{num_blocks()} * (kThreads / kLanes);
  // Whole warps stay in the loop, as both their rows take part in shuffles.
  for (int64_t first = int64_t{block_index()} * (kThreads / kLanes); first < rows;
       first += stride) {
    const int64_t i = first + thread_index() / kLanes;
    const bool is_key = i % sides == 0;
    const int head = static_cast<int>(i / sides % args.num_heads);
    const int64_t token = i < rows ? i / sides / args.num_heads : 0;
    const int64_t slot = i < rows ? ld_global(args.slot_mapping + token) : -1;
    const bool has_rope = is_key && args.rotary_dim > 0;
    // A position that has no angles skips V as well.
    const int position = args.rotary_dim > 0 ? ld_global(args.positions + token) : 0;
    const bool exists = slot >= 0 && slot < args.num_slots &&
                        (args.rotary_dim == 0 || (position >= 0 && position < args.max_position));
    const AppendArgs::Side& side = is_key ? args.k : args.v;
    const uint16_t* from = side.from.at(token, 0, head, 0);
    const int dim = exists ? side.dim : 0;
    float values[kPiece], top = 0;
    if (side.scale.is_per_token)
      for (int column = lane * kPiece; column < dim; column += kLanes * kPiece) {
        load_rotated<Type>(args, values, from, column, dim - column, position, has_rope);
        QUIRE_UNROLL
        for (float value : values) top = max(top, max(value, -value));
      }
    QUIRE_UNROLL
    for (int other = 1; other < kLanes; other *= 2) top = max(top, shuffle_xor(top, other));
    if (!exists) continue;  // the shuffles of the next round bring the lanes together again
    const int64_t block = slot / args.block_size;
    const int row = static_cast<int>(slot % args.block_size);
    const KvScale& given = side.scale;
    float scale = given.value;
    if (given.values) {
      float* own = const_cast<float*>(given.values) + block * given.stride_block +
                   row * given.stride_row + head * given.stride_head;
      scale = given.is_per_token ? scale_of_row(top) : ld_global(own);
      if (given.is_per_token && lane == 0) st_global(own, scale);
    }
    uint8_t* to = side.codes.at(block, row, head, 0);
    for (int column = lane * kPiece; column < dim; column += kLanes * kPiece) {
      load_rotated<Type>(args, values, from, column, dim - column, position, has_rope);
      store_codes(to + column, values, scale, dim - column, args.is_aligned);
    }
  }
}

template <int kThreads>
QUIRE_DEVICE void copy_blocks(const CopyBlocksArgs& args) {
  const int k_pieces = ceil_div(args.k.dim, kPieceBytes);
  const int pieces = k_pieces + ceil_div(args.v.dim, kPieceBytes);
  const int64_t per_block = int64_t{args.block_size} * args.num_heads * pieces;
  for_each<kThreads>(args.num_pairs * per_block, [&](int64_t i) {
    const int64_t pair = i / per_block, rest = i % per_block;
    const int piece = static_cast<int>(rest % pieces);
    const int head = static_cast<int>(rest / pieces % args.num_heads);
    const int row = static_cast<int>(rest / pieces / args.num_heads);
    const int source = ld_global(args.pairs + 2 * pair);
    const int destination = ld_global(args.pairs + 2 * pair + 1);
    const CopyBlocksArgs::Side& side = piece < k_pieces ? args.k : args.v;
    const int column = (piece < k_pieces ? piece : piece - k_pieces) * kPieceBytes;
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
