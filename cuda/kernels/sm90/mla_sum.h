// SPDX-License-Identifier: Apache-2.0
// The warpgroups of sm90/mla_decode.h that sum: each has its columns of weights times values, folds
// them into a total at the end of a chunk, or stores them, and writes its columns of the rows.
#pragma once

#include "kernels/sm90/mla_handover.h"
#include "kernels/sm90/total.h"

namespace quire::device {

// A thread's sums of the rows own_row() and own_row() + 8, of its warpgroup's columns 8n to 8n + 7
// at sums[n / 16][n % 16]: a product has half of them, as one of all would not get by with the
// registers that a block of four warpgroups is launched with.
template <class Traits>
struct MlaColumns {
  float sums[2][Traits::kColumns / 16][4] = {};

  QUIRE_DEVICE const float (&operator[](int n) const)[4] { return sums[n / 16][n % 16]; }
};

template <class Traits>
QUIRE_DEVICE int first_own_column() {
  return fresh_thread_index() / 128 * Traits::kColumns;
}

// A block's total. Columns are counted from the first of a warpgroup.
template <class Traits>
using MlaTotal = GlobalSums<Traits::kColumns / 8, Traits::kSumThreads>;

// chunk += weights x values of a tile.
template <class Traits>
QUIRE_DEVICE void add_tile(MlaColumns<Traits>& chunk, const MlaTurns<Traits>& turns) {
  turns.wait_keys();
  turns.weights.template wait<Handover::kFull>();
  const float rescale[2] = {ld_shared<float>(turns.weights.rescale(own_row())),
                            ld_shared<float>(turns.weights.rescale(own_row() + 8))};
  QUIRE_UNROLL
  for (auto& side : chunk.sums) QUIRE_UNROLL
  for (auto& four : side) QUIRE_UNROLL
  for (int e = 0; e < 4; ++e) four[e] *= rescale[e / 2];
  const SharedAddress values =
      turns.keys() + static_cast<uint32_t>(first_own_column<Traits>() / 64 * Traits::kColumnBytes);
  wgmma_fence();
  QUIRE_UNROLL
  for (int step = 0; step < Traits::kKeys / kTile; ++step) QUIRE_UNROLL
  for (int side = 0; side < 2; ++side)
    wgmma<typename Traits::Type, Major::kN>(
        chunk.sums[side], describe_matrix(turns.weights.operand(step), 16, 1024),
        describe_matrix(
            values + static_cast<uint32_t>(side * 2 * Traits::kColumnBytes + step * kTile * 128),
            Traits::kColumnBytes, 1024),
        true);
  wgmma_commit();
  wgmma_wait<0>();
  turns.weights.template pass<Handover::kEmpty>();
  turns.release_keys();
}

template <class Traits>
QUIRE_DEVICE void store_partial(const AttentionArgs& args, const Item& item, int first_row,
                                int slot, const MlaColumns<Traits>& chunk) {
  const int lane = fresh_thread_index() % kWarpSize;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + own_row() + 8 * h;
    if (row >= item.num_rows) continue;
    float* values = partial_values<typename Traits::Values>(args, slot, row) +
                    first_own_column<Traits>() + lane % 4 * 2;
    QUIRE_UNROLL
    for (int n = 0; n < Traits::kColumns / 8; ++n)
      st_global(reinterpret_cast<F32x2*>(values + 8 * n),
                F32x2{chunk[n][2 * h], chunk[n][2 * h + 1]});
  }
}

// Writes the warp's rows, its columns of them, from `total`.
template <class Traits>
QUIRE_DEVICE void write_unit_rows(const AttentionArgs& args, const Item& item, int first_row,
                                  const FoldSlot<Traits>& folds, const MlaTotal<Traits>& total) {
  constexpr int kPieces = Traits::kColumns / kPiece;
  const int thread = fresh_thread_index(), warp_row = thread / kWarpSize % 4 * kTile;
  sync_warp();
  for (int i = thread % kWarpSize; i < kTile * kPieces; i += kWarpSize) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    if (first_row + warp_row + row >= item.num_rows) continue;
    const F32x4 stats = ld_shared<F32x4>(folds.row(warp_row + row));
    float values[kPiece];
    total.load(values, thread / kWarpSize, row, column);
    write_row<typename Traits::Values>(args, item, first_row + warp_row + row,
                                       first_own_column<Traits>() + column, {stats.z, stats.w},
                                       values);
  }
}

template <class Traits>
QUIRE_DEVICE void sum_unit(const AttentionArgs& args, const MlaUnit& unit,
                           MlaTurns<Traits>& turns) {
  MlaColumns<Traits> chunk;
  for_each_chunk<Traits>(
      args, unit,
      [&](int) {
        add_tile<Traits>(chunk, turns);
        turns.advance();
      },
      [&](const Item& item, int slot, bool is_first, bool is_last) {
        const MlaTotal<Traits> total{args.totals +
                                     int64_t{block_index()} * (Traits::kGlobalBytes / 4)};
        turns.folds.template wait<Handover::kFull>();
        if (slot >= 0) {
          store_partial<Traits>(args, item, unit.first_row, slot, chunk);
        } else {
          const F32x4 low = ld_shared<F32x4>(turns.folds.row(own_row()));
          const F32x4 high = ld_shared<F32x4>(turns.folds.row(own_row() + 8));
          total.fold_chunk(chunk, {low.x, low.y}, {high.x, high.y}, is_first);
          if (is_last) write_unit_rows<Traits>(args, item, unit.first_row, turns.folds, total);
        }
        turns.folds.template pass<Handover::kEmpty>();
        ++turns.folds.turn;
        chunk = MlaColumns<Traits>{};  // the next rescales by 0, but infinities stay
      });
}

// See BlockTeam.
template <class Traits>
struct SumTeam {
  static constexpr int kThreads = Traits::kSumThreads;
  QUIRE_DEVICE static int index() { return thread_index(); }
  QUIRE_DEVICE static void sync(Site site = Site::here()) {
    sync_threads<kThreads>(kSumBarrier, site);
  }
};

template <class Traits>
QUIRE_DEVICE void merge_unit(const AttentionArgs& args, const Item& item, const MlaUnit& unit) {
  const MergeRows rows{item.merge * unit.num_tiles + unit.tile, unit.first_row,
                       min(item.num_rows - unit.first_row, Traits::kRows)};
  merge_if_last<typename Traits::Values>(args, item, shared_base() + Traits::kFlagOffset, rows,
                                         SumTeam<Traits>{});
}

}  // namespace quire::device
