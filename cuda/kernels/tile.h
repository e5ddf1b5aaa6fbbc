// SPDX-License-Identifier: Apache-2.0
// Tiles of rows of kHeadDim 16-bit elements in shared memory: where they lie, how they get there,
// and the two products of attention over them.
#pragma once

#include "kernels/args.h"

namespace quire::device {

// Bytes from a tile's begin to a piece of a row. Pieces are permuted within the row so that eight
// rows of the same column, which ldmatrix reads at once, lie in different banks.
template <int kHeadDim>
QUIRE_DEVICE uint32_t piece_offset(int row, int piece) {
  static_assert(kHeadDim % 32 == 0);
  const int swizzle = kHeadDim % 64 == 0 ? row & 7 : row >> 1 & 3;
  return static_cast<uint32_t>(row * kHeadDim * 2 + ((piece ^ swizzle) << 4));
}

// Brings a piece to shared memory, asynchronously where it can. Of its elements `columns` exist
// (none if <= 0); the rest becomes zero.
template <Mode kMode>
QUIRE_DEVICE void load_piece(SharedAddress to, const uint16_t* from, int columns, bool is_aligned) {
  if (kMode == Mode::kFast || is_aligned)
    return cp_async<16>(to, from, 2 * max(0, min(columns, kPiece)));
  uint32_t words[4] = {};
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i)
    if (i < columns) words[i / 2] |= static_cast<uint32_t>(ld_global(from + i)) << (i % 2 * 16);
  st_shared(to, U32x4{words[0], words[1], words[2], words[3]});
}

// Likewise back to global memory, from floats.
template <class Type, Mode kMode>
QUIRE_DEVICE void store_piece(uint16_t* to, const float (&values)[kPiece], int columns,
                              bool is_aligned) {
  uint32_t words[4];
  QUIRE_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = pack<Type>(values[2 * i], values[2 * i + 1]);
  if ((kMode == Mode::kFast || is_aligned) && columns >= kPiece)
    return st_global(reinterpret_cast<U32x4*>(to), U32x4{words[0], words[1], words[2], words[3]});
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i)
    if (i < columns) st_global(to + i, static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
}

// Query rows [first_row, first_row + kRows) into a tile; rows and columns that do not exist are
// zero, so that they add nothing.
template <class Traits>
QUIRE_DEVICE void load_queries(const AttentionArgs& args, const Item& item, int first_row,
                               SharedAddress tile) {
  constexpr int kPieces = Traits::kHeadDim / kPiece;
  const AttentionParams& p = args.params;
  const auto* q = static_cast<const uint16_t*>(p.q) + item.sequence_index * p.q_stride_seq;
  for (int i = thread_index(); i < Traits::kRows * kPieces; i += Traits::kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool exists = first_row + row < item.num_rows;
    const int source = exists ? first_row + row : 0;
    const int64_t offset = item.batch_row(source) * p.q_stride_row +
                           item.head(source) * p.q_stride_head + piece * kPiece;
    load_piece<Traits::kMode>(tile + piece_offset<Traits::kHeadDim>(row, piece), q + offset,
                              exists ? p.head_dim - piece * kPiece : 0, args.is_aligned);
  }
}

// Fragment of 16 queries times columns [16 step, 16 step + 16).
template <int kHeadDim>
QUIRE_DEVICE void load_query_fragment(uint32_t (&fragment)[4], SharedAddress tile, int first_row,
                                      int step) {
  const int lane = thread_index() % kWarpSize;
  ldmatrix<Transposed::kNo>(
      fragment, tile + piece_offset<kHeadDim>(first_row + lane % 16, 2 * step + lane / 16));
}

// scores[16 queries][kKeys] += queries x keys, for one step of 16 columns.
template <class Type, int kHeadDim, int kKeys>
QUIRE_DEVICE void multiply_keys(float (&scores)[kKeys / 8][4], const uint32_t (&query)[4],
                                SharedAddress keys, int step) {
  const int lane = fresh_thread_index() % kWarpSize;
  QUIRE_UNROLL
  for (int n = 0; n < kKeys / kTile; ++n) {
    uint32_t key[4];
    const int row = n * kTile + lane % 8 + lane / 16 * 8;
    ldmatrix<Transposed::kNo>(key, keys + piece_offset<kHeadDim>(row, 2 * step + lane / 8 % 2));
    mma<Type>(scores[2 * n], query, key[0], key[1]);
    mma<Type>(scores[2 * n + 1], query, key[2], key[3]);
  }
}

// values[16 queries][kHeadDim] += weights x values. The accumulator of one mma has the layout of
// the next one's left operand, so the weights need only be rounded.
template <class Type, int kHeadDim, int kKeys>
QUIRE_DEVICE void multiply_values(float (&sums)[kHeadDim / 8][4],
                                  const float (&weights)[kKeys / 8][4], SharedAddress values) {
  const int lane = fresh_thread_index() % kWarpSize;
  QUIRE_UNROLL
  for (int k = 0; k < kKeys / kTile; ++k) {
    const float (&left)[4] = weights[2 * k];
    const float (&right)[4] = weights[2 * k + 1];
    const uint32_t weight[4] = {pack<Type>(left[0], left[1]), pack<Type>(left[2], left[3]),
                                pack<Type>(right[0], right[1]), pack<Type>(right[2], right[3])};
    QUIRE_UNROLL
    for (int n = 0; n < kHeadDim / kTile; ++n) {
      uint32_t value[4];
      ldmatrix<Transposed::kYes>(
          value, values + piece_offset<kHeadDim>(k * kTile + lane % 16, 2 * n + lane / 16));
      mma<Type>(sums[2 * n], weight, value[0], value[1]);
      mma<Type>(sums[2 * n + 1], weight, value[2], value[3]);
    }
  }
}

}  // namespace quire::device
