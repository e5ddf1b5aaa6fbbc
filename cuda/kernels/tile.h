// SPDX-License-Identifier: Apache-2.0
// Tiles of rows of kHeadDim 16-bit elements in shared memory: where they lie, how they get there,
// and the two products of attention over them.
#pragma once

#include "kernels/args.h"

namespace quire::device {

// Bytes from a tile's begin to a piece of a row. Pieces are permuted within the row so that eight
// rows of the same column, which ldmatrix reads at once, lie in different banks.
template <int kRowBytes>
QUIRE_DEVICE uint32_t piece_offset(int row, int piece) {
  static_assert(kRowBytes % 32 == 0);
  const int swizzle = kRowBytes % 128 == 0  ? row & 7
                      : kRowBytes % 64 == 0 ? row >> 1 & 3
                                            : row >> 2 & 1;
  return static_cast<uint32_t>(row * kRowBytes + ((piece ^ swizzle) << 4));
}

// Brings a piece to shared memory, asynchronously where it can. Of its elements `columns` exist
// (none if <= 0); the rest becomes zero.
template <Mode kMode, class Bits>
QUIRE_DEVICE void load_piece(SharedAddress to, const Bits* from, int columns, bool is_aligned) {
  constexpr int kBytes = sizeof(Bits), kCount = kPieceBytes / kBytes;
  if (kMode == Mode::kFast || is_aligned)
    return cp_async<16>(to, from, kBytes * max(0, min(columns, kCount)));
  uint32_t words[4] = {};
  QUIRE_UNROLL
  for (int i = 0; i < kCount; ++i)
    if (i < columns)
      words[i * kBytes / 4] |= static_cast<uint32_t>(ld_global(from + i)) << (i * kBytes % 4 * 8);
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
    load_piece<Traits::kMode>(tile + piece_offset<2 * Traits::kHeadDim>(row, piece), q + offset,
                              exists ? p.head_dim - piece * kPiece : 0, args.is_aligned);
  }
}

// Fragment of 16 queries times columns [16 step, 16 step + 16). Lanes of a fresh thread index have
// their addresses made anew.
template <int kHeadDim>
QUIRE_DEVICE void load_query_fragment(uint32_t (&fragment)[4], SharedAddress tile, int first_row,
                                      int step, int lane) {
  ldmatrix<Transposed::kNo>(
      fragment, tile + piece_offset<2 * kHeadDim>(first_row + lane % 16, 2 * step + lane / 16));
}

// Queries from row `first_row` of a tile on, 16 columns at a time: in registers, where they fit.
template <class Traits>
struct Queries {
  SharedAddress tile;
  int first_row;
  uint32_t kept[Traits::kKeepQueries ? Traits::kHeadDim / kTile : 1][4];

  QUIRE_DEVICE Queries(SharedAddress tile, int first_row) : tile(tile), first_row(first_row) {
    if constexpr (Traits::kKeepQueries) QUIRE_UNROLL
    for (int step = 0; step < Traits::kHeadDim / kTile; ++step)
      load_query_fragment<Traits::kHeadDim>(kept[step], tile, first_row, step,
                                            fresh_thread_index() % kWarpSize);
  }
  // Valid until the next call.
  QUIRE_DEVICE const uint32_t (&at(int step))[4] {
    if constexpr (Traits::kKeepQueries) {
      return kept[step];
    } else {
      load_query_fragment<Traits::kHeadDim>(kept[0], tile, first_row, step,
                                            fresh_thread_index() % kWarpSize);
      return kept[0];
    }
  }
};

// scores[16 queries][kKeys] += queries x keys.
template <class Traits>
QUIRE_DEVICE void multiply_keys(float (&scores)[Traits::kKeys / 8][4], Queries<Traits>& queries,
                                SharedAddress keys) {
  // Columns that one matrix row of 16 bytes holds are one step of an e4m3 row, half of one of
  // another. A lane's four bytes of e4m3 are columns 4t ... 4t + 3, even ones and odd ones its two
  // operands: prepare_queries has put the columns of queries into that order.
  constexpr int kSteps = Traits::kIsQuantised ? 2 : 1;
  QUIRE_UNROLL
  for (int step = 0; step < Traits::kHeadDim / kTile; step += kSteps) {
    uint32_t key[Traits::kKeys / kTile][4];
    const int lane = fresh_thread_index() % kWarpSize;
    const int piece = 2 * step / kSteps + lane / 8 % 2;
    if constexpr (Traits::kIsQuantised) QUIRE_UNROLL
    for (int n = 0; n < Traits::kKeys / kTile; ++n)
      ldmatrix<Transposed::kNo>(key[n], keys + piece_offset<Traits::kKeyBytes>(
                                                   n * kTile + lane % 8 + lane / 16 * 8, piece));
    QUIRE_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const uint32_t (&query)[4] = queries.at(step + s);
      QUIRE_UNROLL
      for (int n = 0; n < Traits::kKeys / kTile; ++n) {
        if constexpr (!Traits::kIsQuantised)
          ldmatrix<Transposed::kNo>(
              key[n],
              keys + piece_offset<Traits::kKeyBytes>(n * kTile + lane % 8 + lane / 16 * 8, piece));
        QUIRE_UNROLL
        for (int i = 0; i < 2; ++i) {
          uint32_t low = key[n][2 * i], high = key[n][2 * i + 1];
          if constexpr (Traits::kIsQuantised) widen_e4m3(key[n][2 * i + s], low, high);
          mma<typename Traits::Product>(scores[2 * n + i], query, low, high);
        }
      }
    }
  }
}

// sums[16 queries][kHeadDim] += weights x values, whose rows of kKeyBytes have those columns from
// piece `first_piece` on. The accumulator of one mma has the layout of the next one's left operand,
// so the weights need only be rounded.
template <class Traits>
QUIRE_DEVICE void multiply_values(float (&sums)[Traits::kHeadDim / 8][4],
                                  const float (&weights)[Traits::kKeys / 8][4],
                                  SharedAddress values, int first_piece = 0) {
  using Product = typename Traits::Product;
  const int lane = fresh_thread_index() % kWarpSize;
  QUIRE_UNROLL
  for (int k = 0; k < Traits::kKeys / kTile; ++k) {
    const float (&left)[4] = weights[2 * k];
    const float (&right)[4] = weights[2 * k + 1];
    const uint32_t weight[4] = {pack<Product>(left[0], left[1]), pack<Product>(left[2], left[3]),
                                pack<Product>(right[0], right[1]),
                                pack<Product>(right[2], right[3])};
    QUIRE_UNROLL
    for (int n = 0; n < Traits::kHeadDim / (2 * Traits::kKvPiece); ++n) {
      uint32_t value[4];
      ldmatrix<Transposed::kYes>(
          value, values + piece_offset<Traits::kKeyBytes>(k * kTile + lane % 16,
                                                          first_piece + 2 * n + lane / 16));
      if constexpr (Traits::kIsQuantised) {
        // A lane has columns 2g and 2g + 1 of two keys: even and odd columns apart.
        QUIRE_UNROLL
        for (int i = 0; i < 2; ++i) {
          uint32_t even[2], odd[2];
          widen_e4m3(value[2 * i], even[0], odd[0]);
          widen_e4m3(value[2 * i + 1], even[1], odd[1]);
          mma<Product>(sums[4 * n + 2 * i], weight, even[0], even[1]);
          mma<Product>(sums[4 * n + 2 * i + 1], weight, odd[0], odd[1]);
        }
      } else {
        mma<Product>(sums[2 * n], weight, value[0], value[1]);
        mma<Product>(sums[2 * n + 1], weight, value[2], value[3]);
      }
    }
  }
}

// Two neighbouring columns out of `sums`, of row lane / 4 + 8h: where multiply_values has put them.
struct ColumnPair {
  int column;
  F32x2 values;
};

template <class Traits>
QUIRE_DEVICE ColumnPair column_pair(const float (&sums)[Traits::kHeadDim / 8][4], int pair, int h,
                                    int lane) {
  if constexpr (Traits::kIsQuantised) {
    const int n = pair & ~1, odd = pair & 1;
    return {8 * n + lane % 4 * 4 + 2 * odd, {sums[n][2 * h + odd], sums[n + 1][2 * h + odd]}};
  } else {
    return {8 * pair + lane % 4 * 2, {sums[pair][2 * h], sums[pair][2 * h + 1]}};
  }
}

}  // namespace quire::device
