// SPDX-License-Identifier: Apache-2.0
// The planner of cpp/src/attention/plan.cpp on the device, for batches whose lengths only the
// device knows: the same items, in the same order, with the same places for partial results, as
// the host makes of the same lengths. It differs in one thing: Sequence::kv_row is the row of the
// caller's block table, which nobody has looked at.
//
// One block. Lengths become tiles (rows of a sequence and the keys they see), tiles are cut into
// pieces by their share of the whole cost, pieces are sorted, and each becomes an item for every
// kv head. Tiles and pieces are found again by search in running sums, so that threads need not
// know how many of them a sequence or a tile has.
#pragma once

#include "kernels/launch.h"
#include "kernels/traits.h"
#include "prim/math.h"
#include "prim/sm80.h"

namespace quire::device {

// --- Sums over the block -------------------------------------------------------------------------

// `value` becomes the sum of the values of the threads before; returns the sum of all.
template <class Traits>
QUIRE_DEVICE int exclusive_sum(int& value) {
  const SharedAddress sums = shared_base() + Traits::kSumOffset;
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  int inclusive = value;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = shuffle(inclusive, (lane - distance) & (kWarpSize - 1));
    if (lane >= distance) inclusive += before;
  }
  if (lane == kWarpSize - 1) st_shared(sums + warp * 8, inclusive);
  sync_block();
  int total = 0, before = 0;
  for (int w = 0; w < Traits::kWarps; ++w) {
    const int sum = ld_shared<int>(sums + w * 8);
    if (w < warp) before += sum;
    total += sum;
  }
  sync_block();  // before the sums may be overwritten
  value = before + inclusive - value;
  return total;
}

template <class Traits>
QUIRE_DEVICE int64_t sum_of_all(int64_t value) {
  const SharedAddress sums = shared_base() + Traits::kSumOffset;
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const auto low = static_cast<uint32_t>(shuffle(static_cast<int>(value), lane ^ distance));
    const int high = shuffle(static_cast<int>(value >> 32), lane ^ distance);
    value += static_cast<int64_t>(high) << 32 | low;
  }
  if (lane == 0) st_shared(sums + warp * 8, value);
  sync_block();
  int64_t total = 0;
  for (int w = 0; w < Traits::kWarps; ++w) total += ld_shared<int64_t>(sums + w * 8);
  sync_block();
  return total;
}

// The last index in [0, count) whose value is at most `value`; those of the indices never fall.
template <class ValueOf>
QUIRE_DEVICE int last_at_most(int count, int value, ValueOf value_of) {
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = low + (high - low) / 2;
    (value_of(middle) <= value ? low : high) = middle;
  }
  return low;
}

// --- Tiles ---------------------------------------------------------------------------------------

QUIRE_DEVICE Sequence planned_sequence(const PlanArgs& args, int index) {
  const auto bounded = [](int value, int most) { return min(max(value, 0), most); };
  Sequence s{index, 1, bounded(ld_global(args.seq_lens + index), args.max_seq_len), index};
  if (args.cu_seqlens_q) {
    s.q_begin = bounded(ld_global(args.cu_seqlens_q + index), args.max_total_q);
    s.q_len = max(0, min(ld_global(args.cu_seqlens_q + index + 1), args.max_total_q) - s.q_begin);
  }
  return s;
}

// Writes where the sequences' tiles begin. Returns how many tiles there are.
template <class Traits>
QUIRE_DEVICE int place_tiles(const PlanArgs& args) {
  int num_tiles = 0;
  for (int first = 0; first < args.num_sequences; first += Traits::kThreads) {
    const int index = first + thread_index();
    int tiles = 0;
    if (index < args.num_sequences)
      tiles = ceil_div(planned_sequence(args, index).q_len, args.tile_rows);
    const int total = exclusive_sum<Traits>(tiles);
    if (index < args.num_sequences) st_global(args.first_tiles + index, num_tiles + tiles);
    num_tiles = min(num_tiles + total, args.max_tiles);  // the lengths make no sense if it is more
  }
  sync_block();  // what is in memory is read by other threads from here on
  return num_tiles;
}

// Keys [begin, end) that query row `row` of a sequence sees.
QUIRE_DEVICE void planned_keys(const PlanArgs& args, const Sequence& s, int row, int64_t& begin,
                               int64_t& end) {
  const int64_t position = int64_t{s.seq_len} - s.q_len + row;
  const int64_t left = position - args.window_left, right = position + args.window_right + 1;
  begin = args.window_left < 0 || left < 0 ? 0 : left;
  end = args.window_right < 0 || right > s.seq_len ? s.seq_len : right;
  if (end < begin) end = begin;
}

QUIRE_DEVICE PlanTile make_tile(const PlanArgs& args, int index) {
  const auto first_of = [&](int i) { return ld_global(args.first_tiles + i); };
  const int sequence = last_at_most(args.num_sequences, index, first_of);
  const Sequence s = planned_sequence(args, sequence);
  PlanTile tile{sequence, (index - first_of(sequence)) * args.tile_rows, 0, 0, 0, 0, 0, 0, -1, -1};
  tile.q_end = tile.q_begin + min(args.tile_rows, s.q_len - tile.q_begin);
  int64_t begin, end, last_begin, last_end;
  planned_keys(args, s, tile.q_begin, begin, end);
  planned_keys(args, s, tile.q_end - 1, last_begin, last_end);
  if (begin < last_end) {
    tile.kv_begin = static_cast<int>(begin / kKvChunk * kKvChunk);
    tile.kv_end = static_cast<int>(last_end);
  }
  return tile;
}

QUIRE_DEVICE PlanTile load_tile(const PlanTile* t) {
  return {ld_global(&t->sequence),   ld_global(&t->q_begin),      ld_global(&t->q_end),
          ld_global(&t->kv_begin),   ld_global(&t->kv_end),       ld_global(&t->first_piece),
          ld_global(&t->num_pieces), ld_global(&t->piece_chunks), ld_global(&t->merge),
          ld_global(&t->partial)};
}

QUIRE_DEVICE void store_tile(PlanTile* to, const PlanTile& t) {
  st_global(&to->sequence, t.sequence);
  st_global(&to->q_begin, t.q_begin);
  st_global(&to->q_end, t.q_end);
  st_global(&to->kv_begin, t.kv_begin);
  st_global(&to->kv_end, t.kv_end);
  st_global(&to->first_piece, t.first_piece);
  st_global(&to->num_pieces, t.num_pieces);
  st_global(&to->piece_chunks, t.piece_chunks);
  st_global(&to->merge, t.merge);
  st_global(&to->partial, t.partial);
}

QUIRE_DEVICE int num_chunks(const PlanTile& tile) {
  return tile.kv_end / kKvChunk + (tile.kv_end % kKvChunk > 0) - tile.kv_begin / kKvChunk;
}

// In rows x keys, for each kv head. Of few rows it is that of reading the keys: kReadCost of the
// host's planner.
QUIRE_DEVICE int64_t cost_of(const PlanArgs& args, const PlanTile& tile, int keys) {
  constexpr int64_t kReadCost = 16;
  const int64_t rows = int64_t{tile.q_end - tile.q_begin} * args.group;
  return keys * (rows > kReadCost ? rows : kReadCost);
}

// --- Pieces --------------------------------------------------------------------------------------

// A tile that alone would take more than a quarter of a worker's fair share is cut.
template <class Traits>
QUIRE_DEVICE int64_t cost_to_share(const PlanArgs& args, int num_tiles) {
  int64_t cost = 0;
  for (int i = thread_index(); i < num_tiles; i += Traits::kThreads) {
    const PlanTile tile = make_tile(args, i);
    cost += cost_of(args, tile, tile.kv_end - tile.kv_begin) * args.num_kv_heads;
  }
  const int64_t share = sum_of_all<Traits>(cost) / (4 * int64_t{args.parallelism});
  if (args.parallelism == 1) return INT64_MAX;
  return share > 1 ? share : 1;
}

QUIRE_DEVICE void cut_tile(const PlanArgs& args, int64_t share, PlanTile& tile) {
  const int chunks = max(1, num_chunks(tile));
  const int64_t cost = cost_of(args, tile, tile.kv_end - tile.kv_begin);
  const int64_t wanted = 1 + (cost > 1 ? cost - 1 : 0) / share;
  const int parts = wanted < chunks ? static_cast<int>(wanted) : chunks;
  tile.piece_chunks = ceil_div(chunks, parts);
  tile.num_pieces = ceil_div(chunks, tile.piece_chunks);
}

// Writes the tiles, with the places of their pieces, merges and partial results. Returns how many
// pieces there are.
template <class Traits>
QUIRE_DEVICE int place_pieces(const PlanArgs& args, int num_tiles) {
  const int64_t share = cost_to_share<Traits>(args, num_tiles);
  const int heads = args.num_kv_heads;
  int num_pieces = 0, num_merges = 0, num_partials = 0;
  for (int first = 0; first < num_tiles; first += Traits::kThreads) {
    const int index = first + thread_index();
    PlanTile tile{};
    if (index < num_tiles) {
      tile = make_tile(args, index);
      cut_tile(args, share, tile);
    }
    const bool is_split = tile.num_pieces > 1;
    int piece = tile.num_pieces, merge = is_split ? heads : 0;
    int partial = is_split ? num_chunks(tile) * heads : 0;
    const int pieces = exclusive_sum<Traits>(piece);
    const int merges = exclusive_sum<Traits>(merge);
    const int partials = exclusive_sum<Traits>(partial);
    if (index < num_tiles) {
      tile.first_piece = num_pieces + piece;
      if (is_split) tile.merge = num_merges + merge, tile.partial = num_partials + partial;
      store_tile(args.tiles + index, tile);
    }
    num_pieces += pieces, num_merges += merges, num_partials += partials;
  }
  if (thread_index() == 0) {
    st_global(&args.counts->num_items, num_pieces * heads);
    st_global(&args.counts->num_merges, num_merges);
    st_global(&args.counts->num_partials, num_partials);
  }
  sync_block();
  return num_pieces;
}

// A piece of a tile: some of its chunks.
struct PlanPiece {
  PlanTile tile;
  int first_chunk, kv_begin, kv_end;  // the first chunk is counted from that of the tile

  QUIRE_DEVICE PlanPiece(const PlanArgs& args, int num_tiles, int index) {
    const auto first_of = [&](int i) { return ld_global(&args.tiles[i].first_piece); };
    tile = load_tile(args.tiles + last_at_most(num_tiles, index, first_of));
    first_chunk = (index - tile.first_piece) * tile.piece_chunks;
    kv_begin = tile.kv_begin + first_chunk * kKvChunk;
    const int64_t end = int64_t{kv_begin} + int64_t{tile.piece_chunks} * kKvChunk;
    kv_end = end < tile.kv_end ? static_cast<int>(end) : tile.kv_end;
  }
};

// --- Order ---------------------------------------------------------------------------------------

QUIRE_DEVICE Phase phase_of(const PlanArgs& args, int sequence) {
  const int64_t rows = int64_t{planned_sequence(args, sequence).q_len} * args.group;
  return rows <= args.decode_rows ? kDecode : rows >= args.wide_rows ? kWide : kNarrow;
}

// By phase, the costly ones first: the keys that are sorted. No two pieces are equal, as their
// indices decide what is left.
QUIRE_DEVICE uint64_t key_of(const PlanArgs& args, const PlanPiece& piece) {
  constexpr uint64_t kMost = (uint64_t{1} << 62) - 1;
  const auto cost = static_cast<uint64_t>(cost_of(args, piece.tile, piece.kv_end - piece.kv_begin));
  return static_cast<uint64_t>(phase_of(args, piece.tile.sequence)) << 62 | (kMost - cost);
}

template <class Traits>
struct PieceOrder {
  QUIRE_DEVICE static SharedAddress key(int i) {
    return shared_base() + Traits::kKeyOffset + i * 8;
  }
  QUIRE_DEVICE static SharedAddress piece(int i) {
    return shared_base() + Traits::kOrderOffset + i * 4;
  }

  // Puts entries `low` and `high` in order.
  QUIRE_DEVICE static void exchange(int low, int high, bool ascending) {
    const auto low_key = ld_shared<uint64_t>(key(low)), high_key = ld_shared<uint64_t>(key(high));
    const auto low_piece = ld_shared<int>(piece(low)), high_piece = ld_shared<int>(piece(high));
    const bool is_ascending = low_key < high_key || (low_key == high_key && low_piece < high_piece);
    if (is_ascending == ascending) return;
    st_shared(key(low), high_key), st_shared(key(high), low_key);
    st_shared(piece(low), high_piece), st_shared(piece(high), low_piece);
  }
};

// Leaves the pieces in shared memory as their items are to follow each other: a bitonic sort. Over
// short distances the entries of 32 exchanges in a row stay among themselves, so that a warp does
// not have to wait for others.
template <class Traits>
QUIRE_DEVICE void sort_pieces(const PlanArgs& args, int num_tiles, int num_pieces) {
  using Order = PieceOrder<Traits>;
  int count = 1;
  while (count < num_pieces) count *= 2;
  for (int i = thread_index(); i < count; i += Traits::kThreads) {
    const uint64_t key =
        i < num_pieces ? key_of(args, PlanPiece(args, num_tiles, i)) : ~uint64_t{0};
    st_shared(Order::key(i), key);
    st_shared(Order::piece(i), i);
  }
  sync_block();
  for (int size = 2; size <= count; size *= 2)
    for (int distance = size / 2; distance > 0; distance /= 2) {
      for (int i = thread_index(); i < count / 2; i += Traits::kThreads) {
        const int low = 2 * i - (i & (distance - 1));
        Order::exchange(low, low + distance, (low & size) == 0);
      }
      const int next = distance > 1 ? distance / 2 : size;
      if (max(distance, next) > kWarpSize)
        sync_block();
      else
        sync_warp();
    }
  sync_block();
}

// --- Lists ---------------------------------------------------------------------------------------

QUIRE_DEVICE void store_item(ListedItem* to, const WorkItem& work, const Sequence& sequence) {
  st_global(&to->work.sequence, work.sequence);
  st_global(&to->work.kv_head, work.kv_head);
  st_global(&to->work.q_begin, work.q_begin);
  st_global(&to->work.q_end, work.q_end);
  st_global(&to->work.kv_begin, work.kv_begin);
  st_global(&to->work.kv_end, work.kv_end);
  st_global(&to->work.partial, work.partial);
  st_global(&to->work.merge, work.merge);
  st_global(&to->sequence.q_begin, sequence.q_begin);
  st_global(&to->sequence.q_len, sequence.q_len);
  st_global(&to->sequence.seq_len, sequence.seq_len);
  st_global(&to->sequence.kv_row, sequence.kv_row);
}

template <class Traits>
QUIRE_DEVICE void write_items(const PlanArgs& args, int num_tiles, int num_pieces) {
  using Order = PieceOrder<Traits>;
  const int heads = args.num_kv_heads;
  for (int i = thread_index(); i < num_pieces * heads; i += Traits::kThreads) {
    const int head = i % heads;
    const PlanPiece piece(args, num_tiles, ld_shared<int>(Order::piece(i / heads)));
    const PlanTile& tile = piece.tile;
    WorkItem item{tile.sequence,  head,         tile.q_begin, tile.q_end,
                  piece.kv_begin, piece.kv_end, -1,           -1};
    if (tile.num_pieces > 1) {
      item.partial = tile.partial + head * num_chunks(tile) + piece.first_chunk;
      item.merge = tile.merge + head;
    }
    store_item(args.items + i, item, planned_sequence(args, tile.sequence));
  }
  // Where the phase changes a range ends and another begins.
  const auto phase_at = [](int i) {
    return static_cast<int>(ld_shared<uint64_t>(Order::key(i)) >> 62);
  };
  for (int i = thread_index(); i < num_pieces; i += Traits::kThreads) {
    ItemRange* range = args.counts->ranges + phase_at(i);
    if (i == 0 || phase_at(i - 1) != phase_at(i)) st_global(&range->begin, i * heads);
    if (i == num_pieces - 1 || phase_at(i + 1) != phase_at(i))
      st_global(&range->end, (i + 1) * heads);
  }
}

template <class Traits>
QUIRE_DEVICE void write_merges(const PlanArgs& args, int num_tiles) {
  for (int i = thread_index(); i < num_tiles * args.num_kv_heads; i += Traits::kThreads) {
    const int head = i % args.num_kv_heads;
    const PlanTile tile = load_tile(args.tiles + i / args.num_kv_heads);
    if (tile.num_pieces <= 1) continue;
    MergeItem* to = args.merges + tile.merge + head;
    const int chunks = num_chunks(tile);
    st_global(&to->sequence, tile.sequence);
    st_global(&to->kv_head, head);
    st_global(&to->q_begin, tile.q_begin);
    st_global(&to->q_end, tile.q_end);
    st_global(&to->partial, tile.partial + head * chunks);
    st_global(&to->num_partials, chunks);
    st_global(&to->num_items, tile.num_pieces);
    for (int c = 0; c < args.counters_a_merge; ++c)
      st_global(args.counters + (tile.merge + head) * args.counters_a_merge + c, 0u);
  }
}

template <class Traits>
QUIRE_DEVICE void plan(const PlanArgs& args) {
  for (int i = thread_index(); i < 2 * kNumPhases; i += Traits::kThreads)
    st_global(&args.counts->ranges[0].begin + i, 0);
  if (thread_index() == 0) st_global(args.tickets, 0u);
  const int num_tiles = place_tiles<Traits>(args);
  const int num_pieces = place_pieces<Traits>(args, num_tiles);
  sort_pieces<Traits>(args, num_tiles, num_pieces);
  write_items<Traits>(args, num_tiles, num_pieces);
  write_merges<Traits>(args, num_tiles);
}

}  // namespace quire::device
