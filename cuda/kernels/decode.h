// SPDX-License-Identifier: Apache-2.0
// decode: attention of at most 16 rows at a time, for steps that add few tokens to long sequences.
//
// The 16 rows of one mma are the query heads that share a kv head. Tiles of 16 keys are dealt to
// the warps in turn; each warp has a ring of stages of its own in shared memory and looks up where
// its next keys lie one tile ahead, so nothing but the end of a chunk makes warps wait for each
// other. There the warps' results are added in warp order and folded into the total, which is
// spread over the registers of all threads.
#pragma once

#include "kernels/keys.h"
#include "kernels/state.h"

namespace quire::device {

// What a thread carries through the tiles of its warp, for rows lane / 4 and lane / 4 + 8.
template <class Traits>
struct DecodeState {
  float sums[Traits::kHeadDim / 8][4] = {};
  RowStats chunk[2];
  ScoreRow rows[2];
  float units[2];  // of a quantised cache
};

// A thread's share of the total: of one row, a piece of each round's columns.
template <class Traits>
struct DecodeTotal {
  RowStats stats;
  float kept[Traits::kKeepTotal ? Traits::kRounds : 1][kPiece] = {};

  QUIRE_DEVICE static int row() { return thread_index() / (Traits::kThreads / Traits::kRows); }
  QUIRE_DEVICE static int column(int round) {
    const int piece = thread_index() % (Traits::kThreads / Traits::kRows);
    return round * Traits::kRoundColumns + piece * kPiece;
  }
  // A round's values; zeros before the first chunk is added.
  QUIRE_DEVICE void take(float (&values)[kPiece], int round, bool is_first) const {
    F32x4 low{0, 0, 0, 0}, high{0, 0, 0, 0};
    if constexpr (Traits::kKeepTotal) {
      low = {kept[round][0], kept[round][1], kept[round][2], kept[round][3]};
      high = {kept[round][4], kept[round][5], kept[round][6], kept[round][7]};
    } else if (!is_first) {
      low = ld_shared<F32x4>(slot(round));
      high = ld_shared<F32x4>(slot(round) + 16);
    }
    const float taken[kPiece] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    QUIRE_UNROLL
    for (int i = 0; i < kPiece; ++i) values[i] = taken[i];
  }
  QUIRE_DEVICE void put(const float (&values)[kPiece], int round) {
    if constexpr (Traits::kKeepTotal) {
      QUIRE_UNROLL
      for (int i = 0; i < kPiece; ++i) kept[round][i] = values[i];
    } else {
      st_shared(slot(round), F32x4{values[0], values[1], values[2], values[3]});
      st_shared(slot(round) + 16, F32x4{values[4], values[5], values[6], values[7]});
    }
  }

 private:
  QUIRE_DEVICE static SharedAddress slot(int round) {
    return shared_base() + static_cast<uint32_t>(Traits::kTotalOffset +
                                                 (round * Traits::kThreads + thread_index()) * 32);
  }
};

// The ring of one warp: its tiles of an item are first, first + kWarps, ... while below end.
template <class Traits>
class DecodeRing {
 public:
  QUIRE_DEVICE DecodeRing(const AttentionArgs& args, const Item& item, KeyRange keys)
      : args_(args), item_(item), source_(args.params, item), keys_(keys) {
    const int warp = thread_index() / kWarpSize;
    const int begin = keys.begin / Traits::kKeys;
    next_ = begin + (warp - begin % Traits::kWarps + Traits::kWarps) % Traits::kWarps;
    // All stages' locations are asked for before the first is waited for.
    Location first[Traits::kStages];
    QUIRE_UNROLL
    for (int i = 0; i < Traits::kStages; ++i) first[i] = locate_own(next_ + i * Traits::kWarps);
    QUIRE_UNROLL
    for (int i = 0; i < Traits::kStages - 1; ++i) load_next(first[i]);
    next_location_ = first[Traits::kStages - 1];
  }

  // Waits for the oldest tile on its way and sends another one. Lanes that are still reading the
  // stage to be refilled are waited for.
  QUIRE_DEVICE SharedAddress advance() {
    cp_async_wait<Traits::kStages - 2>();
    sync_warp();
    load_next(next_location_);
    next_location_ = locate_own(next_);
    const SharedAddress tile = stage(read_stage_);
    read_stage_ = (read_stage_ + 1) % Traits::kStages;
    return tile;
  }

 private:
  QUIRE_DEVICE static SharedAddress stage(int index) {
    const int warp = thread_index() / kWarpSize;
    return shared_base() +
           static_cast<uint32_t>(Traits::kStageOffset +
                                 (warp * Traits::kStages + index) * Traits::kStageBytes);
  }

  // Lane i finds key i % 16 of a tile.
  QUIRE_DEVICE Location locate_own(int tile) const {
    return locate(args_.params, item_, keys_,
                  tile * Traits::kKeys + thread_index() % Traits::kKeys);
  }

  // `own` is where this lane's key lies. Beyond the last tile there is nothing to copy, but the
  // groups are counted on.
  QUIRE_DEVICE void load_next(Location own) {
    constexpr int kPieces = Traits::kKeyBytes / kPieceBytes;
    const int lane = fresh_thread_index() % kWarpSize;
    if (next_ * Traits::kKeys < keys_.end) {
      const SharedAddress k_tile = stage(write_stage_);
      if constexpr (Traits::kIsQuantised) load_token_scales(k_tile, own, lane);
      QUIRE_UNROLL
      for (int i = 0; i < Traits::kKeys * kPieces / kWarpSize; ++i) {
        const int row = (i * kWarpSize + lane) / kPieces, piece = (i * kWarpSize + lane) % kPieces;
        const int key = next_ * Traits::kKeys + row;
        const Location at{shuffle(own.block, row), shuffle(own.row, row)};
        const SharedAddress to = k_tile + piece_offset<Traits::kKeyBytes>(row, piece);
        source_.load(args_, at, key >= keys_.begin && key < keys_.end, piece, to,
                     to + Traits::kKeyTileBytes);
      }
    }
    cp_async_commit();
    next_ += Traits::kWarps;
    write_stage_ = (write_stage_ + 1) % Traits::kStages;
  }

  // The lower half of the lanes those of K, the upper half those of V, each of its own key.
  QUIRE_DEVICE void load_token_scales(SharedAddress stage, Location own, int lane) {
    const AttentionParams& p = args_.params;
    const int key = next_ * Traits::kKeys + lane % Traits::kKeys;
    const KvScale& scale = lane < Traits::kKeys ? p.k_scale : p.v_scale;
    load_token_scale(scale, item_, own, key >= keys_.begin && key < keys_.end,
                     stage + (2 * Traits::kKeyTileBytes + lane * 4));
  }

  const AttentionArgs& args_;
  const Item& item_;
  KeySource<Traits> source_;
  KeyRange keys_;
  int next_;  // tile to be sent next, and where its keys lie
  Location next_location_;
  int write_stage_ = 0;
  int read_stage_ = 0;
};

template <class Traits>
QUIRE_DEVICE void attend_tile(const AttentionParams& p, DecodeState<Traits>& state,
                              Queries<Traits>& queries, float factor, int tile,
                              SharedAddress stage) {
  float scores[Traits::kKeys / 8][4] = {};
  multiply_keys<Traits>(scores, queries, stage);
  if constexpr (Traits::kIsQuantised)
    scale_scores<Traits::kKeys>(state.units, k_scales<Traits>(p, stage), scores);
  mask_scores<Traits::kMode, Traits::kKeys>(p, state.rows, tile * Traits::kKeys, scores);
  add_to_softmax<Traits>(factor, v_scales<Traits>(p, stage), state.chunk, scores, state.sums);
  multiply_values<Traits>(state.sums, scores, stage + Traits::kKeyTileBytes);
}

// --- The end of a chunk --------------------------------------------------------------------------

template <class Traits>
QUIRE_DEVICE SharedAddress exchange_slot(int warp, int row, int column) {
  const int swizzled = column ^ (row & 3) << 3;  // rows written at once lie in different banks
  return shared_base() +
         static_cast<uint32_t>(Traits::kExchangeOffset +
                               ((warp * kTile + row) * Traits::kRoundColumns + swizzled) * 4);
}

template <class Traits>
QUIRE_DEVICE SharedAddress stats_slot(int warp, int row) {
  return shared_base() + static_cast<uint32_t>(Traits::kStatsOffset + (warp * kTile + row) * 8);
}

// This warp's sums of the round's columns, for the others to read.
template <class Traits>
QUIRE_DEVICE void give_columns(const DecodeState<Traits>& state, int round) {
  const int thread = fresh_thread_index();
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  QUIRE_UNROLL
  for (int i = 0; i < Traits::kRoundColumns / 8; ++i) {
    const int first = round * Traits::kRoundColumns, n = first / 8 + i;
    if (n >= Traits::kHeadDim / 8) break;
    QUIRE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const ColumnPair pair = column_pair<Traits>(state.sums, n, h, lane);
      st_shared(exchange_slot<Traits>(warp, lane / 4 + 8 * h, pair.column - first), pair.values);
    }
  }
}

// Of this thread's row: the state of the chunk over all warps, and each warp's share in it.
template <class Traits>
QUIRE_DEVICE RowStats add_stats(float (&shares)[Traits::kWarps]) {
  F32x2 stats[Traits::kWarps];
  RowStats all;
  QUIRE_UNROLL
  for (int warp = 0; warp < Traits::kWarps; ++warp) {
    stats[warp] = ld_shared<F32x2>(stats_slot<Traits>(warp, DecodeTotal<Traits>::row()));
    all.max = max(all.max, stats[warp].x);
  }
  QUIRE_UNROLL
  for (int warp = 0; warp < Traits::kWarps; ++warp) {
    shares[warp] = exp2(stats[warp].x - finite_or_zero(all.max));
    all.sum = fma(stats[warp].y, shares[warp], all.sum);
  }
  return all;
}

template <class Traits>
QUIRE_DEVICE void add_columns(const float (&shares)[Traits::kWarps], float (&values)[kPiece]) {
  const int column = DecodeTotal<Traits>::column(0);
  QUIRE_UNROLL
  for (int warp = 0; warp < Traits::kWarps; ++warp) {
    const SharedAddress slot = exchange_slot<Traits>(warp, DecodeTotal<Traits>::row(), column);
    const F32x4 low = ld_shared<F32x4>(slot), high = ld_shared<F32x4>(slot + 16);
    const float given[kPiece] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    QUIRE_UNROLL
    for (int i = 0; i < kPiece; ++i) values[i] = fma(given[i], shares[warp], values[i]);
  }
}

// Adds up the warps' results of a chunk and folds it, or stores it in `slot` (if >= 0).
template <class Traits>
QUIRE_DEVICE void finish_chunk(const AttentionArgs& args, const Item& item,
                               DecodeState<Traits>& state, DecodeTotal<Traits>& total, float factor,
                               int slot, bool is_first, int first_row) {
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const RowStats stats = state.chunk[h].finish(factor);
    if (lane % 4 == 0)
      st_shared(stats_slot<Traits>(warp, lane / 4 + 8 * h), F32x2{stats.max, stats.sum});
  }
  const int row = first_row + total.row();
  float shares[Traits::kWarps];
  RowStats chunk;
  FoldScales scales;
  QUIRE_UNROLL
  for (int round = 0; round < Traits::kRounds; ++round) {
    give_columns<Traits>(state, round);
    sync_block();
    if (round == 0) {
      chunk = add_stats<Traits>(shares);
      if (slot < 0) scales = fold(total.stats, chunk);
    }
    const int column = total.column(round);
    if (column < Traits::kHeadDim) {
      float values[kPiece] = {};
      add_columns<Traits>(shares, values);
      if (slot < 0) {
        float before[kPiece];
        total.take(before, round, is_first);
        QUIRE_UNROLL
        for (int i = 0; i < kPiece; ++i) values[i] = scales.apply(before[i], values[i]);
        total.put(values, round);
      } else if (row < item.num_rows) {
        store_floats(partial_values<Traits>(args, slot, row) + column, values);
        if (column == 0) st_global(partial_stats(args, slot, row), F32x2{chunk.max, chunk.sum});
      }
    }
    sync_block();
  }
}

// --- The loop ------------------------------------------------------------------------------------

template <class Traits>
QUIRE_DEVICE void decode_rows(const AttentionArgs& args, const Item& item, int first_row) {
  const AttentionParams& p = args.params;
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const int last_row = min(item.num_rows, first_row + Traits::kRows) - 1;
  const KeyRange keys = keys_to_read(p, item, first_row, last_row);
  const float factor = score_factor<Traits>(p);
  const SharedAddress query_tile = shared_base() + Traits::kQueryOffset;

  load_queries<Traits>(args, item, first_row, query_tile);
  cp_async_commit();
  DecodeRing<Traits> ring(args, item, keys);
  cp_async_wait<Traits::kStages - 1>();
  sync_block();
  if constexpr (Traits::kIsQuantised) {
    prepare_queries<Traits>(p, item, query_tile);
    sync_block();
  }
  Queries<Traits> queries(query_tile, 0);
  if (Traits::kKeepQueries) sync_block();  // before the exchange may take their place

  DecodeTotal<Traits> total;
  const int first_chunk = item.kv_begin / kKvChunk;
  const int end_chunk = max(first_chunk + 1, ceil_div(item.kv_end, kKvChunk));
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    DecodeState<Traits> state;
    QUIRE_UNROLL
    for (int h = 0; h < 2; ++h)
      state.rows[h] = make_score_row(p, item, min(first_row + lane / 4 + 8 * h, last_row));
    if constexpr (Traits::kIsQuantised) load_units<Traits>(state.units, 0);
    constexpr int kTilesPerChunk = kKvChunk / Traits::kKeys;
    const int end = min((chunk + 1) * kTilesPerChunk, ceil_div(keys.end, Traits::kKeys));
    for (int tile = chunk * kTilesPerChunk + warp; tile < end; tile += Traits::kWarps)
      if ((tile + 1) * Traits::kKeys > keys.begin)
        attend_tile<Traits>(p, state, queries, factor, tile, ring.advance());
    const int slot = item.partial < 0 ? -1 : item.partial + chunk - first_chunk;
    finish_chunk<Traits>(args, item, state, total, factor, slot, chunk == first_chunk, first_row);
  }
  cp_async_wait<0>();
  const int row = first_row + total.row();
  if (item.partial >= 0 || row >= item.num_rows) return;
  QUIRE_UNROLL
  for (int round = 0; round < Traits::kRounds; ++round) {
    if (total.column(round) >= Traits::kHeadDim) continue;
    float values[kPiece];
    total.take(values, round, false);
    write_row<Traits>(args, item, row, total.column(round), total.stats, values);
  }
}

template <class Traits>
QUIRE_DEVICE void decode(const AttentionArgs& args) {
  for (int i = first_item(args) + block_index(); i < end_of_items(args); i += num_blocks()) {
    const Item item = load_item(args, i);
    for (int row = 0; row < item.num_rows; row += Traits::kRows)
      decode_rows<Traits>(args, item, row);
    if (item.merge < 0) continue;
    merge_if_last<Traits, 8>(args, item, shared_base() + Traits::kFlagOffset, all_rows(item));
  }
}

}  // namespace quire::device
