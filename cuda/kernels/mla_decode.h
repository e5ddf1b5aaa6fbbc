// SPDX-License-Identifier: Apache-2.0
// mla_decode: attention over a latent cache. Values are the leading columns of the keys, so each
// row is brought to shared memory once and takes part in both products.
//
// Rows are query rows times heads; kColumnWarps warps share 16 of them. Of the product with the
// keys each of those takes every kColumnWarps-th step of 16 columns, so that its part of the
// queries stays in registers; what they get is added through shared memory, by each of them, in
// warp order. So all have the same scores and weights, and each multiplies them with columns of the
// values of its own. Chunks are folded in registers, and nothing is exchanged at their end.
#pragma once

#include "kernels/keys.h"
#include "kernels/state.h"

namespace quire::device {

// Of the block's warps: which 16 rows, and which share of the columns.
template <class Traits>
QUIRE_DEVICE int row_warp() {
  return fresh_thread_index() / kWarpSize / Traits::kColumnWarps;
}
template <class Traits>
QUIRE_DEVICE int column_warp() {
  return fresh_thread_index() / kWarpSize % Traits::kColumnWarps;
}

// A thread's values of rows lane / 4 and lane / 4 + 8: those of a chunk, or of all before it.
template <class Traits>
struct MlaSums {
  float columns[Traits::kColumns / 8][4] = {};
  RowStats rows[2];
};

// Tiles of keys, each brought by all warps together.
template <class Traits>
class MlaRing {
 public:
  QUIRE_DEVICE MlaRing(const AttentionArgs& args, const Item& item, KeyRange keys)
      : args_(args),
        item_(item),
        source_(args.params, item),
        keys_(keys),
        next_location_(locate_own(keys.begin / Traits::kKeys)) {
    for (int i = 0; i < Traits::kStages - 1; ++i) load(keys.begin / Traits::kKeys + i, i);
  }

  // Waits for a tile, the next one, and for all warps to be done with the one before it, whose
  // stage is then refilled.
  QUIRE_DEVICE SharedAddress advance(int tile) {
    cp_async_wait<Traits::kStages - 2>();
    sync_block();
    load(tile + Traits::kStages - 1, (stage_ + Traits::kStages - 1) % Traits::kStages);
    const SharedAddress at = address(stage_);
    stage_ = (stage_ + 1) % Traits::kStages;
    return at;
  }

 private:
  QUIRE_DEVICE static SharedAddress address(int stage) {
    return shared_base() +
           static_cast<uint32_t>(Traits::kStageOffset + stage * Traits::kStageBytes);
  }
  // Of a tile, the row that this lane brings with seven others, every eighth piece of it.
  QUIRE_DEVICE static int own_row() { return fresh_thread_index() / kLanes; }
  QUIRE_DEVICE Location locate_own(int tile) const {
    return locate(args_.params, item_, keys_, tile * Traits::kKeys + own_row());
  }

  // Beyond the last tile there is nothing to copy, but the groups are counted on.
  QUIRE_DEVICE void load(int tile, int stage) {
    if (tile * Traits::kKeys < keys_.end) {
      const int row = own_row(), key = tile * Traits::kKeys + row;
      const int first_piece = fresh_thread_index() % kLanes;
      const SharedAddress to = address(stage) + piece_offset<Traits::kKeyBytes>(row, first_piece);
      QUIRE_UNROLL
      for (int i = 0; i < Traits::kKeyBytes / kPieceBytes / kLanes; ++i) {
        source_.load_key(args_, next_location_, key >= keys_.begin && key < keys_.end,
                         first_piece + i * kLanes, to + i * kLanes * kPieceBytes);
      }
    }
    cp_async_commit();
    next_location_ = locate_own(tile + 1);
  }

  static constexpr int kLanes = Traits::kThreads / Traits::kKeys;  // that bring one row
  const AttentionArgs& args_;
  const Item& item_;
  KeySource<Traits> source_;
  KeyRange keys_;
  Location next_location_;  // of this lane's row of the tile to be sent next
  int stage_ = 0;           // of the tile to be read next
};

// --- A tile --------------------------------------------------------------------------------------

// What masks have to know of a thread's rows, lane / 4 and lane / 4 + 8 of its warp. It lies in
// shared memory, as sums and queries leave no registers for it.
template <class Traits>
QUIRE_DEVICE SharedAddress score_row_slot(int h) {
  const int row = row_warp<Traits>() * kTile + fresh_thread_index() % kWarpSize / 4 + 8 * h;
  return shared_base() + static_cast<uint32_t>(Traits::kRowOffset + row * 32);
}

// This warp's steps of queries x keys.
template <class Traits>
QUIRE_DEVICE void multiply_key_columns(float (&scores)[Traits::kKeys / 8][4],
                                       const uint32_t (&queries)[Traits::kSteps][4],
                                       SharedAddress keys) {
  const int lane = fresh_thread_index() % kWarpSize;
  // Pieces are permuted within eight, which are one step of all warps that share the rows.
  const SharedAddress first =
      keys + piece_offset<Traits::kKeyBytes>(lane % 8 + lane / 16 * 8,
                                             2 * column_warp<Traits>() + lane / 8 % 2);
  QUIRE_UNROLL
  for (int step = 0; step < Traits::kSteps; ++step) {
    QUIRE_UNROLL
    for (int n = 0; n < Traits::kKeys / kTile; ++n) {
      uint32_t key[4];
      ldmatrix<Transposed::kNo>(key,
                                first + (step * 8 * kPieceBytes + n * kTile * Traits::kKeyBytes));
      mma<typename Traits::Type>(scores[2 * n], queries[step], key[0], key[1]);
      mma<typename Traits::Type>(scores[2 * n + 1], queries[step], key[2], key[3]);
    }
  }
}

// Where warp `warp` leaves fragment n of its scores, lane by lane.
template <class Traits>
QUIRE_DEVICE SharedAddress score_slot(int warp, int n) {
  const int lane = fresh_thread_index() % kWarpSize;
  return shared_base() +
         static_cast<uint32_t>(Traits::kScoreOffset +
                               ((warp * (Traits::kKeys / 8) + n) * kWarpSize + lane) * 16);
}

// The sum over the warps that share the rows, masked, to each of them. The keys of fragment n are
// warp n's to add up: so the options are applied once, and few scores are in registers meanwhile.
template <class Traits>
QUIRE_DEVICE void add_scores(const AttentionParams& p, int tile,
                             float (&scores)[Traits::kKeys / 8][4]) {
  const int first_warp = row_warp<Traits>() * Traits::kColumnWarps, own = column_warp<Traits>();
  QUIRE_UNROLL
  for (int n = 0; n < Traits::kKeys / 8; ++n)
    st_shared(score_slot<Traits>(first_warp + own, n),
              F32x4{scores[n][0], scores[n][1], scores[n][2], scores[n][3]});
  sync_block();
  if (own < Traits::kKeys / 8) {
    float sum[1][4] = {};
    QUIRE_UNROLL
    for (int warp = 0; warp < Traits::kColumnWarps; ++warp) {
      const F32x4 given = ld_shared<F32x4>(score_slot<Traits>(first_warp + warp, own));
      sum[0][0] += given.x, sum[0][1] += given.y, sum[0][2] += given.z, sum[0][3] += given.w;
    }
    const ScoreRow rows[2] = {load_score_row<Traits::kMode>(score_row_slot<Traits>(0)),
                              load_score_row<Traits::kMode>(score_row_slot<Traits>(1))};
    mask_scores<Traits::kMode, 8>(p, rows, tile * Traits::kKeys + 8 * own, sum);
    st_shared(score_slot<Traits>(first_warp, own),
              F32x4{sum[0][0], sum[0][1], sum[0][2], sum[0][3]});
  }
  sync_block();
  QUIRE_UNROLL
  for (int n = 0; n < Traits::kKeys / 8; ++n) {
    const F32x4 sum = ld_shared<F32x4>(score_slot<Traits>(first_warp, n));
    scores[n][0] = sum.x, scores[n][1] = sum.y, scores[n][2] = sum.z, scores[n][3] = sum.w;
  }
}

template <class Traits>
QUIRE_DEVICE void attend_mla_tile(const AttentionParams& p, MlaSums<Traits>& chunk,
                                  const uint32_t (&queries)[Traits::kSteps][4], float factor,
                                  int tile, SharedAddress keys) {
  using Columns = typename Traits::Columns;
  float scores[Traits::kKeys / 8][4] = {};
  multiply_key_columns<Traits>(scores, queries, keys);
  add_scores<Traits>(p, tile, scores);
  add_to_softmax<Columns>(factor, TokenScales{keys, false}, chunk.rows, scores, chunk.columns);
  multiply_values<Columns>(chunk.columns, scores, keys,
                           column_warp<Traits>() * (Traits::kColumns / kPiece));
}

// --- The end of a chunk and of the rows ----------------------------------------------------------

// Folds a chunk into the total, or stores it in `slot` (if >= 0).
template <class Traits>
QUIRE_DEVICE void finish_mla_chunk(const AttentionArgs& args, const Item& item,
                                   const MlaSums<Traits>& chunk, MlaSums<Traits>& total,
                                   float factor, int slot, int first_row) {
  const int lane = fresh_thread_index() % kWarpSize;
  const int first_column = column_warp<Traits>() * Traits::kColumns;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const RowStats stats = chunk.rows[h].finish(factor);
    if (slot < 0) {
      const FoldScales scales = fold(total.rows[h], stats);
      QUIRE_UNROLL
      for (int n = 0; n < Traits::kColumns / 8; ++n) QUIRE_UNROLL
      for (int e = 2 * h; e < 2 * h + 2; ++e)
        total.columns[n][e] = scales.apply(total.columns[n][e], chunk.columns[n][e]);
      continue;
    }
    const int row = first_row + row_warp<Traits>() * kTile + lane / 4 + 8 * h;
    if (row >= item.num_rows) continue;
    float* values = partial_values<typename Traits::Values>(args, slot, row) + first_column;
    QUIRE_UNROLL
    for (int n = 0; n < Traits::kColumns / 8; ++n)
      st_global(reinterpret_cast<F32x2*>(values + 8 * n + lane % 4 * 2),
                F32x2{chunk.columns[n][2 * h], chunk.columns[n][2 * h + 1]});
    if (first_column == 0 && lane % 4 == 0)
      st_global(partial_stats(args, slot, row), F32x2{stats.max, stats.sum});
  }
}

// Two of this warp's columns of one of its rows, where the stages were. Eight columns are a piece;
// the permutation keeps the rows that a warp writes at once in different banks.
template <class Traits>
QUIRE_DEVICE SharedAddress result_slot(const MlaSums<Traits>&, int row, int column) {
  const int warp = fresh_thread_index() / kWarpSize;
  return shared_base() +
         static_cast<uint32_t>(
             Traits::kStageOffset +
             ((warp * kTile + row) * Traits::kColumns + (column ^ (row & 3) << 3)) * 4);
}

// Writes the block's rows, once no warp reads the stages any more.
template <class Traits>
QUIRE_DEVICE void write_mla_rows(const AttentionArgs& args, const Item& item,
                                 const MlaSums<Traits>& total, int first_row) {
  constexpr int kPieces = Traits::kColumns / kPiece;
  const int thread = fresh_thread_index();
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const SharedAddress stats = shared_base() + (Traits::kStatsOffset + warp * kTile * 8);
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    if (lane % 4 == 0) st_shared(stats + row * 8, F32x2{total.rows[h].max, total.rows[h].sum});
    QUIRE_UNROLL
    for (int n = 0; n < Traits::kColumns / 8; ++n)
      st_shared(result_slot(total, row, 8 * n + lane % 4 * 2),
                F32x2{total.columns[n][2 * h], total.columns[n][2 * h + 1]});
  }
  sync_warp();
  const int first_column = column_warp<Traits>() * Traits::kColumns;
  for (int i = lane; i < kTile * kPieces; i += kWarpSize) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    const int item_row = first_row + row_warp<Traits>() * kTile + row;
    if (item_row >= item.num_rows) continue;
    const F32x2 of_row = ld_shared<F32x2>(stats + row * 8);
    const F32x4 low = ld_shared<F32x4>(result_slot(total, row, column));
    const F32x4 high = ld_shared<F32x4>(result_slot(total, row, column) + 16);
    float values[kPiece] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    write_row<typename Traits::Values>(args, item, item_row, first_column + column,
                                       {of_row.x, of_row.y}, values);
  }
}

// --- The loop ------------------------------------------------------------------------------------

// Loads the item anew wherever it is needed again: no register holds it through the tiles.
template <class Traits>
QUIRE_DEVICE void mla_decode_rows(const AttentionArgs& args, int index, int first_row) {
  const AttentionParams& p = args.params;
  const Item item = load_item(args, index);
  const int lane = fresh_thread_index() % kWarpSize, warp_row = row_warp<Traits>() * kTile;
  const int last_row = min(item.num_rows, first_row + Traits::kRows) - 1;
  const KeyRange keys = keys_to_read(p, item, first_row, last_row);
  const float factor = score_factor<Traits>(p);
  const SharedAddress query_tile = shared_base() + Traits::kQueryOffset;

  load_queries<Traits>(args, item, first_row, query_tile);
  cp_async_commit();
  MlaRing<Traits> ring(args, item, keys);
  cp_async_wait<Traits::kStages - 1>();
  sync_block();
  uint32_t queries[Traits::kSteps][4];
  QUIRE_UNROLL
  for (int step = 0; step < Traits::kSteps; ++step)
    load_query_fragment<Traits::kHeadDim>(queries[step], query_tile, warp_row,
                                          Traits::kColumnWarps * step + column_warp<Traits>(),
                                          thread_index() % kWarpSize);
  if (column_warp<Traits>() == 0 && lane % 4 == 0) QUIRE_UNROLL
  for (int h = 0; h < 2; ++h)
    store_score_row(
        score_row_slot<Traits>(h),
        make_score_row(p, item, min(first_row + warp_row + lane / 4 + 8 * h, last_row)));

  MlaSums<Traits> total;
  int tile = keys.begin / Traits::kKeys, chunk = item.kv_begin / kKvChunk;
  const int end_tile = keys.begin < keys.end ? ceil_div(keys.end, Traits::kKeys) : tile;
  bool is_last;
  do {
    MlaSums<Traits> sums;
    const int end = min(end_tile, (chunk + 1) * (kKvChunk / Traits::kKeys));
    for (; tile < end; ++tile)
      attend_mla_tile<Traits>(p, sums, queries, factor, tile, ring.advance(tile));
    const Item again = load_item(args, index);
    const int slot = again.partial < 0 ? -1 : again.partial + chunk - again.kv_begin / kKvChunk;
    finish_mla_chunk<Traits>(args, again, sums, total, factor, slot, first_row);
    is_last = ++chunk * kKvChunk >= again.kv_end;
  } while (!is_last);
  cp_async_wait<0>();
  sync_block();
  const Item again = load_item(args, index);
  if (again.partial < 0) {
    write_mla_rows<Traits>(args, again, total, first_row);
    sync_block();
  }
}

// Blocks that follow each other take the tiles of rows of one item, so that its keys come from
// memory once and then from L2. The tiles are merged on their own, too.
template <class Traits>
QUIRE_DEVICE void mla_decode(const AttentionArgs& args) {
  const int tiles = ceil_div(args.item_rows, Traits::kRows);
  for (int i = block_index(); i < (end_of_items(args) - first_item(args)) * tiles;
       i += num_blocks()) {
    const int index = first_item(args) + i / tiles, tile = i % tiles;
    const int first_row = tile * Traits::kRows;
    if (first_row >= load_item(args, index).num_rows) continue;
    mla_decode_rows<Traits>(args, index, first_row);
    const Item item = load_item(args, index);
    if (item.merge < 0) continue;
    merge_if_last<typename Traits::Values>(
        args, item, shared_base() + Traits::kFlagOffset,
        {item.merge * tiles + tile, first_row, min(item.num_rows - first_row, Traits::kRows)});
  }
}

}  // namespace quire::device
