// SPDX-License-Identifier: Apache-2.0
// prefill: attention of tiles of 64 or 128 rows, for prompts and chunks of prompts.
//
// Each warp owns 16 rows and sees all keys. Tiles of keys go through two stages of shared memory:
// while one is computed on, the next is on its way. One barrier a tile. The result of the running
// chunk of kKvChunk keys is in registers; those before it have been folded into `total`, which
// only the warp that owns the rows touches.
#pragma once

#include "kernels/keys.h"
#include "kernels/state.h"

namespace quire::device {

// What a thread carries through the tiles of its 16 rows.
template <class Traits>
struct PrefillState {
  float sums[Traits::kHeadDim / 8][4] = {};
  RowStats chunk[2];  // of rows lane / 4 and lane / 4 + 8
  RowStats total[2];
  ScoreRow rows[2];
  float units[2];  // of a quantised cache
};

// Tiles [begin, end) of an item, counted from the start of the sequence.
template <class Traits>
struct PrefillTiles {
  KeyRange keys;
  int begin, end;

  QUIRE_DEVICE explicit PrefillTiles(KeyRange range)
      : keys(range),
        begin(range.begin / Traits::kKeys),
        end(range.begin < range.end ? ceil_div(range.end, Traits::kKeys) : begin) {}
};

template <class Traits>
QUIRE_DEVICE SharedAddress location_slot(int tile, int row) {
  return shared_base() +
         static_cast<uint32_t>(Traits::kLocationOffset + (tile % 2 * Traits::kKeys + row) * 8);
}

// Thread i finds key i of the tile.
template <class Traits>
QUIRE_DEVICE Location locate_own(const AttentionArgs& args, const Item& item,
                                 const PrefillTiles<Traits>& tiles, int tile) {
  if (thread_index() >= Traits::kKeys) return {0, 0};
  return locate(args.params, item, tiles.keys, tile * Traits::kKeys + thread_index());
}

template <class Traits>
QUIRE_DEVICE void store_location(int tile, Location location) {
  if (thread_index() >= Traits::kKeys) return;
  st_shared(location_slot<Traits>(tile, thread_index()),
            U32x2{static_cast<uint32_t>(location.block), static_cast<uint32_t>(location.row)});
}

template <class Traits>
QUIRE_DEVICE SharedAddress stage_of(int tile) {
  return shared_base() +
         static_cast<uint32_t>(Traits::kStageOffset + tile % 2 * Traits::kStageBytes);
}

// Thread i sends the scales of key i of the tile.
template <class Traits>
QUIRE_DEVICE void load_token_scales(const AttentionArgs& args, const Item& item,
                                    const PrefillTiles<Traits>& tiles, int tile) {
  const int row = thread_index(), key = tile * Traits::kKeys + row;
  if (row >= Traits::kKeys) return;
  const bool exists = key >= tiles.keys.begin && key < tiles.keys.end;
  const U32x2 found = ld_shared<U32x2>(location_slot<Traits>(tile, row));
  const Location at{static_cast<int>(found.x), static_cast<int>(found.y)};
  const SharedAddress to = stage_of<Traits>(tile) + (2 * Traits::kKeyTileBytes + row * 4);
  load_token_scale(args.params.k_scale, item, at, exists, to);
  load_token_scale(args.params.v_scale, item, at, exists, to + Traits::kKeys * 4);
}

// Sends K and V of a tile on their way to its stage, as one group.
template <class Traits>
QUIRE_DEVICE void load_keys(const AttentionArgs& args, const Item& item,
                            const PrefillTiles<Traits>& tiles, int tile) {
  constexpr int kPieces = Traits::kKeyBytes / kPieceBytes;
  const int thread = fresh_thread_index();
  const KeySource<Traits> source(args.params, item);
  if constexpr (Traits::kIsQuantised) load_token_scales(args, item, tiles, tile);
  const SharedAddress k_tile = stage_of<Traits>(tile);
  const SharedAddress v_tile = k_tile + Traits::kKeyTileBytes;
  QUIRE_UNROLL
  for (int i = 0; i < Traits::kKeys * kPieces / Traits::kThreads; ++i) {
    const int index = i * Traits::kThreads + thread;
    const int row = index / kPieces, piece = index % kPieces;
    const int key = tile * Traits::kKeys + row;
    const U32x2 at = ld_shared<U32x2>(location_slot<Traits>(tile, row));
    const uint32_t offset = piece_offset<Traits::kKeyBytes>(row, piece);
    source.load(args, {static_cast<int>(at.x), static_cast<int>(at.y)},
                key >= tiles.keys.begin && key < tiles.keys.end, piece, k_tile + offset,
                v_tile + offset);
  }
  cp_async_commit();
}

// --- Chunks --------------------------------------------------------------------------------------

// Two columns of a row in `total`. Eight columns are a piece; the permutation keeps the rows that
// a warp writes at once in different banks.
template <class Traits>
QUIRE_DEVICE SharedAddress total_slot(int row, int column) {
  return shared_base() +
         static_cast<uint32_t>(Traits::kTotalOffset +
                               (row * Traits::kHeadDim + (column ^ (row & 3) << 3)) * 4);
}

// `total` in shared memory, each warp's rows its own.
template <class Traits>
struct SharedTotal {
  // Adds the chunk's result; the first one is `total`.
  QUIRE_DEVICE void fold_chunk(PrefillState<Traits>& state, bool is_first) const {
    const int lane = fresh_thread_index() % kWarpSize;
    const int warp_row = thread_index() / kWarpSize * kTile;
    QUIRE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const FoldScales scales = fold(state.total[h], state.chunk[h]);
      QUIRE_UNROLL
      for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
        const ColumnPair pair = column_pair<Traits>(state.sums, n, h, lane);
        const SharedAddress slot = total_slot<Traits>(warp_row + lane / 4 + 8 * h, pair.column);
        const F32x2 before = is_first ? F32x2{0, 0} : ld_shared<F32x2>(slot);
        st_shared(slot, F32x2{scales.apply(before.x, pair.values.x),
                              scales.apply(before.y, pair.values.y)});
      }
    }
  }
  QUIRE_DEVICE void load_stats(PrefillState<Traits>&) const {}  // they are there
  // Eight columns of a row of the warp, after a warp sync.
  QUIRE_DEVICE void load(float (&values)[kPiece], int row, int column) const {
    const F32x4 low = ld_shared<F32x4>(total_slot<Traits>(row, column));
    const F32x4 high = ld_shared<F32x4>(total_slot<Traits>(row, column) + 16);
    const float loaded[kPiece] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    QUIRE_UNROLL
    for (int i = 0; i < kPiece; ++i) values[i] = loaded[i];
  }
};

template <class Traits>
QUIRE_DEVICE void store_chunk(const AttentionArgs& args, const Item& item,
                              const PrefillState<Traits>& state, int slot, int first_row) {
  const int lane = fresh_thread_index() % kWarpSize;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = first_row + lane / 4 + 8 * h;
    if (row >= item.num_rows) continue;
    float* values = partial_values<Traits>(args, slot, row);
    QUIRE_UNROLL
    for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
      const ColumnPair pair = column_pair<Traits>(state.sums, n, h, lane);
      st_global(reinterpret_cast<F32x2*>(values + pair.column), pair.values);
    }
    if (lane % 4 == 0)
      st_global(partial_stats(args, slot, row), F32x2{state.chunk[h].max, state.chunk[h].sum});
  }
}

// A chunk is complete: folds it or leaves it to be merged, and begins the next one.
template <class Traits, class Total = SharedTotal<Traits>>
QUIRE_DEVICE void finish_chunk(const AttentionArgs& args, const Item& item,
                               PrefillState<Traits>& state, float factor, int chunk, bool is_first,
                               int first_row, const Total& total = {}) {
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) state.chunk[h] = state.chunk[h].finish(factor);
  if (item.partial < 0) {
    total.fold_chunk(state, is_first);
  } else {
    const int slot = item.partial + chunk - item.kv_begin / kKvChunk;
    const int warp_row = thread_index() / kWarpSize * kTile;
    store_chunk<Traits>(args, item, state, slot, first_row + warp_row);
  }
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) state.chunk[h] = RowStats{};
  QUIRE_UNROLL
  for (auto& column : state.sums) QUIRE_UNROLL
  for (float& sum : column) sum = 0;
}

// Writes the warp's rows from `total`.
template <class Traits, class Total = SharedTotal<Traits>>
QUIRE_DEVICE void write_total(const AttentionArgs& args, const Item& item,
                              const PrefillState<Traits>& state, int first_row,
                              const Total& sums = {}) {
  constexpr int kPieces = Traits::kHeadDim / kPiece;
  const int lane = thread_index() % kWarpSize, warp_row = thread_index() / kWarpSize * kTile;
  const SharedAddress stats = shared_base() + Traits::kStatsOffset;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h)
    if (lane % 4 == 0)
      st_shared(stats + (warp_row + lane / 4 + 8 * h) * 8,
                F32x2{state.total[h].max, state.total[h].sum});
  sync_warp();
  for (int i = lane; i < kTile * kPieces; i += kWarpSize) {
    const int row = warp_row + i / kPieces, column = i % kPieces * kPiece;
    if (first_row + row >= item.num_rows) continue;
    const F32x2 total = ld_shared<F32x2>(stats + row * 8);
    float values[kPiece];
    sums.load(values, row, column);
    write_row<Traits>(args, item, first_row + row, column, {total.x, total.y}, values);
  }
}

// --- The loop ------------------------------------------------------------------------------------

template <class Traits>
QUIRE_DEVICE void attend_tile(const AttentionParams& p, PrefillState<Traits>& state,
                              Queries<Traits>& queries, float factor, int tile) {
  const SharedAddress stage = stage_of<Traits>(tile);
  float scores[Traits::kKeys / 8][4] = {};
  multiply_keys<Traits>(scores, queries, stage);
  if constexpr (Traits::kIsQuantised)
    scale_scores<Traits::kKeys>(state.units, k_scales<Traits>(p, stage), scores);
  mask_scores<Traits::kMode, Traits::kKeys>(p, state.rows, tile * Traits::kKeys, scores);
  add_to_softmax<Traits>(factor, v_scales<Traits>(p, stage), state.chunk, scores, state.sums);
  multiply_values<Traits>(state.sums, scores, stage + Traits::kKeyTileBytes);
}

// Rows [first_row, first_row + kRows) of an item, which is loaded anew wherever it is needed again:
// no register holds it through the tiles.
template <class Traits>
QUIRE_DEVICE void prefill_rows(const AttentionArgs& args, int index, int first_row) {
  const AttentionParams& p = args.params;
  const Item item = load_item(args, index);
  const int lane = thread_index() % kWarpSize, warp_row = thread_index() / kWarpSize * kTile;
  const int last_row = min(item.num_rows, first_row + Traits::kRows) - 1;
  const PrefillTiles<Traits> tiles(keys_to_read(p, item, first_row, last_row));
  const float factor = score_factor<Traits>(p);

  load_queries<Traits>(args, item, first_row, shared_base() + Traits::kQueryOffset);
  cp_async_commit();
  store_location<Traits>(tiles.begin, locate_own(args, item, tiles, tiles.begin));
  store_location<Traits>(tiles.begin + 1, locate_own(args, item, tiles, tiles.begin + 1));
  sync_block();
  load_keys(args, item, tiles, tiles.begin);
  cp_async_wait<1>();
  sync_block();
  if constexpr (Traits::kIsQuantised) {
    prepare_queries<Traits>(p, item, shared_base() + Traits::kQueryOffset);
    sync_block();
  }
  Queries<Traits> queries(shared_base() + Traits::kQueryOffset, warp_row);
  sync_block();  // before `total` may take the place of the queries
  PrefillState<Traits> state;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h)
    state.rows[h] = make_score_row(p, item, min(first_row + warp_row + lane / 4 + 8 * h, last_row));
  if constexpr (Traits::kIsQuantised) load_units<Traits>(state.units, warp_row);

  // Every chunk of the item is finished, the ones that these rows do not see as well: whoever
  // merges expects all of them.
  constexpr int kTilesPerChunk = kKvChunk / Traits::kKeys;
  int chunk = item.kv_begin / kKvChunk;
  bool is_last;
  do {
    const int begin = max(tiles.begin, chunk * kTilesPerChunk);
    const int end = min(tiles.end, (chunk + 1) * kTilesPerChunk);
    for (int tile = begin; tile < end; ++tile) {
      cp_async_wait<0>();
      sync_block();
      if (tile + 1 < tiles.end) load_keys(args, item, tiles, tile + 1);
      const Location later = locate_own(args, item, tiles, tile + 2);
      attend_tile<Traits>(p, state, queries, factor, tile);
      store_location<Traits>(tile + 2, later);
    }
    const Item same = load_item(args, index);
    const bool is_first = chunk == same.kv_begin / kKvChunk;
    finish_chunk<Traits>(args, same, state, factor, chunk, is_first, first_row);
    is_last = ++chunk * kKvChunk >= same.kv_end;
  } while (!is_last);
  cp_async_wait<0>();
  const Item same = load_item(args, index);
  if (same.partial < 0) write_total<Traits>(args, same, state, first_row);
  sync_block();
}

template <class Traits>
QUIRE_DEVICE void prefill(const AttentionArgs& args) {
  for (int i = first_item(args) + block_index(); i < end_of_items(args); i += num_blocks()) {
    for (int row = 0; row < load_item(args, i).num_rows; row += Traits::kRows)
      prefill_rows<Traits>(args, i, row);
    const Item item = load_item(args, i);
    if (item.merge < 0) continue;
    merge_if_last<Traits>(args, item, shared_base() + Traits::kFlagOffset, all_rows(item));
  }
}

}  // namespace quire::device
