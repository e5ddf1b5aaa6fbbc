// SPDX-License-Identifier: Apache-2.0
// The planner: a batch -> a list of work items. Pure; reads lengths and block ids, no tensor.
//
// Query rows are cut into tiles and, where one tile's keys would keep a worker busy for too long,
// keys into runs of whole chunks (kKvChunk). Chunk boundaries are counted from the start of the
// sequence, so cutting differently never changes a bit of the result; nor does it when tiles of
// several sequences meet the chunks that they have in common in one unit of work.
#include <algorithm>
#include <limits>
#include <utility>

#include "attention/tile.h"
#include "quire/error.h"

namespace quire {
namespace {

// Costs and statistics of lengths that no memory holds saturate.
int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}
int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<int64_t>::max() : sum;
}

std::vector<Sequence> make_sequences(const AttentionDesc& desc, const AttentionBatch& batch) {
  std::vector<Sequence> sequences(batch.batch_size);
  for (int b = 0; b < batch.batch_size; ++b) {
    Sequence& s = sequences[b];
    if (desc.block_size > 0) {
      s = {b, 1, batch.seq_lens[b], 0};  // kv_row: see add_extents
    } else if (batch.cu_seqlens_k) {
      s.kv_row = batch.cu_seqlens_k[b];
      s.seq_len = batch.cu_seqlens_k[b + 1] - s.kv_row;
    } else {
      s = {0, batch.dense_q, batch.dense_k, 0};
    }
    if (batch.cu_seqlens_q) {
      s.q_begin = batch.cu_seqlens_q[b];
      s.q_len = batch.cu_seqlens_q[b + 1] - s.q_begin;
    }
  }
  return sequences;
}

std::vector<Tile> make_tiles(const AttentionDesc& desc, const std::vector<Sequence>& sequences,
                             const PlanTraits& traits) {
  const int group = desc.num_heads / desc.num_kv_heads;
  const int tile_rows = std::max(1, traits.max_rows / group);
  std::vector<Tile> tiles;
  tiles.reserve(sequences.size());
  for (size_t b = 0; b < sequences.size(); ++b) {
    const Sequence& sequence = sequences[b];
    for (int q_begin = 0, q_end; q_begin < sequence.q_len; q_begin = q_end) {
      q_end = q_begin + std::min(tile_rows, sequence.q_len - q_begin);
      const KeyRange first = visible_keys(desc, sequence, q_begin);
      const KeyRange last = visible_keys(desc, sequence, q_end - 1);
      Tile tile{static_cast<int32_t>(b), q_begin, q_end, 0, 0, 0, 0, (q_end - q_begin) * group};
      if (first.begin < last.end) {
        tile.kv_begin = static_cast<int32_t>(first.begin / kKvChunk * kKvChunk);
        tile.kv_end = static_cast<int32_t>(last.end);
        tile.whole_begin = static_cast<int32_t>((last.begin + kKvChunk - 1) / kKvChunk);
        tile.whole_end = static_cast<int32_t>(first.end / kKvChunk);
      }
      tiles.push_back(tile);
    }
  }
  return tiles;
}

// Cuts the tiles into pieces, gives those of a tile their places to meet, and lists the items.
class Cutter {
 public:
  Cutter(const AttentionDesc& desc, const PlanTraits& traits, const std::vector<Tile>& tiles,
         Runs runs, AttentionPlan& plan)
      : num_kv_heads_(desc.num_kv_heads),
        group_(desc.num_heads / desc.num_kv_heads),
        traits_(traits),
        tiles_(tiles),
        runs_(std::move(runs)),
        plan_(plan),
        places_(tiles.size()) {}

  void cut() {
    add_private_runs();
    int64_t total = 0;
    for (const Run& run : runs_.runs) total = plus(total, times(cost(run), num_kv_heads_));
    // A run is cut when it alone would take more than a quarter of a worker's fair share.
    share_ = traits_.parallelism == 1
                 ? std::numeric_limits<int64_t>::max()
                 : std::max<int64_t>(1, total / (4 * int64_t{traits_.parallelism}));
    for (const Run& run : runs_.runs) cut(run);
    place_partials();
    emit();
  }

 private:
  struct Piece {
    Run run;
    int32_t num_heads;  // kv heads of a unit
    int64_t cost;       // of a unit
  };
  struct Place {  // of a tile's results
    int32_t num_pieces = 0;
    bool is_shared = false;
    int32_t merge = -1;    // of kv head 0, then those of the others
    int32_t partial = -1;  // first slot, likewise
  };

  static int32_t end_key(const Run& run, const Tile& tile) {
    return static_cast<int32_t>(std::min<int64_t>(int64_t{run.chunk_end} * kKvChunk, tile.kv_end));
  }

  // In rows x keys, for each kv head.
  int64_t cost(const Run& run) const {
    int64_t rows = 0;
    for (int i = run.member_begin; i < run.member_end; ++i) rows += tiles_[runs_.members[i]].rows;
    const Tile& tile = tiles_[runs_.members[run.member_begin]];
    const int64_t keys =
        std::max<int64_t>(0, end_key(run, tile) - int64_t{run.chunk_begin} * kKvChunk);
    return times(keys, runs_.size(run) > 1 ? kReadCost + rows : std::max(kReadCost, rows));
  }

  // What is left of each tile when its shared runs are taken out.
  void add_private_runs() {
    std::vector<int32_t> next(tiles_.size());
    for (size_t i = 0; i < tiles_.size(); ++i) next[i] = tiles_[i].first_chunk();
    const auto add = [&](int32_t tile, int32_t begin, int32_t end) {
      const auto member = static_cast<int32_t>(runs_.members.size());
      runs_.members.push_back(tile);
      runs_.runs.push_back({member, member + 1, begin, end});
    };
    const size_t num_shared = runs_.runs.size();
    for (size_t r = 0; r < num_shared; ++r) {
      const Run run = runs_.runs[r];
      for (int i = run.member_begin; i < run.member_end; ++i) {
        const int32_t tile = runs_.members[i];
        if (next[tile] < run.chunk_begin) add(tile, next[tile], run.chunk_begin);
        next[tile] = run.chunk_end;
        places_[tile].is_shared = true;
      }
    }
    for (size_t i = 0; i < tiles_.size(); ++i)
      if (next[i] < tiles_[i].end_chunk() || !places_[i].is_shared)
        add(static_cast<int32_t>(i), next[i], tiles_[i].end_chunk());
  }

  // A run by its chunks, and where those do not suffice or its rows are too many, by its members.
  // Few rows of one sequence are cut for all kv heads together, before their heads are dealt out:
  // their keys lie side by side in token-major caches, and are then read side by side.
  void cut(const Run& run) {
    const bool few_alone = traits_.sharing != Sharing::kNever && runs_.size(run) == 1 &&
                           tiles_[runs_.members[run.member_begin]].rows <= kReadCost;
    const int64_t whole = cost(run) * (few_alone ? num_kv_heads_ : 1);
    const int64_t chunks = std::max(1, run.chunk_end - run.chunk_begin);
    const int64_t parts = std::min(chunks, 1 + std::max<int64_t>(0, whole - 1) / share_);
    const int64_t step = (chunks + parts - 1) / parts;
    for (Run part = run; part.member_begin < run.member_end; part.member_begin = part.member_end) {
      part.member_end = end_of_part(part, run.member_end);
      for (int64_t begin = 0; begin < chunks; begin += step) {
        part.chunk_begin = static_cast<int32_t>(run.chunk_begin + begin);
        part.chunk_end =
            static_cast<int32_t>(std::min<int64_t>(run.chunk_end, part.chunk_begin + step));
        const int64_t fit = few_alone ? share_ / std::max<int64_t>(1, cost(part)) : 1;
        const auto heads = static_cast<int32_t>(std::clamp<int64_t>(fit, 1, num_kv_heads_));
        pieces_.push_back({part, heads, cost(part) * heads});
      }
    }
    for (int i = run.member_begin; i < run.member_end; ++i)
      places_[runs_.members[i]].num_pieces += static_cast<int32_t>((chunks + step - 1) / step);
  }

  // As many members as a worker's share and the most rows of an item allow, but enough rows to be
  // worth the reading.
  int32_t end_of_part(const Run& part, int32_t end) const {
    const int64_t least = 4 * kReadCost;
    const int64_t most =
        std::min<int64_t>(traits_.max_rows, std::max(least, share_ / kKvChunk - kReadCost));
    int64_t rows = 0;
    for (int32_t i = part.member_begin; i < end; ++i) {
      rows += tiles_[runs_.members[i]].rows;
      if (rows > most && i > part.member_begin) return i;
    }
    return end;
  }

  // Tiles of several pieces, and those whose piece is shared, leave a result for each chunk.
  void place_partials() {
    const auto needs_merge = [&](size_t i) {
      return places_[i].num_pieces > 1 || places_[i].is_shared;
    };
    for (size_t i = 0; i < tiles_.size(); ++i)
      if (needs_merge(i)) plan_.partial_rows = std::max(plan_.partial_rows, tiles_[i].rows);
    if (traits_.sharing != Sharing::kNever)
      plan_.partial_rows = std::min(plan_.partial_rows, group_);
    for (size_t i = 0; i < tiles_.size(); ++i) {
      if (!needs_merge(i)) continue;
      const Tile& tile = tiles_[i];
      Place& place = places_[i];
      place.merge = static_cast<int32_t>(plan_.merges.size());
      place.partial = plan_.num_partials;
      const int chunks = tile.end_chunk() - tile.first_chunk();
      for (int kv_head = 0; kv_head < num_kv_heads_; ++kv_head) {
        plan_.merges.push_back({tile.sequence, kv_head, tile.q_begin, tile.q_end,
                                plan_.num_partials, chunks, place.num_pieces});
        plan_.num_partials += chunks * slots_a_chunk(tile);
      }
    }
  }

  int slots_a_chunk(const Tile& tile) const {
    return (tile.rows + plan_.partial_rows - 1) / plan_.partial_rows;
  }

  void emit() {
    std::stable_sort(pieces_.begin(), pieces_.end(),
                     [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
    plan_.items.reserve(pieces_.size() * num_kv_heads_);
    plan_.units.reserve(pieces_.size() * num_kv_heads_);
    for (const Piece& piece : pieces_)
      for (int kv_head = 0; kv_head < num_kv_heads_; kv_head += piece.num_heads) {
        const auto begin = static_cast<int32_t>(plan_.items.size());
        for (int h = kv_head; h < std::min(kv_head + piece.num_heads, num_kv_heads_); ++h)
          emit(piece.run, h);
        plan_.units.push_back({begin, static_cast<int32_t>(plan_.items.size())});
      }
  }

  void emit(const Run& run, int kv_head) {
    for (int i = run.member_begin; i < run.member_end; ++i) {
      const Tile& tile = tiles_[runs_.members[i]];
      const Place& place = places_[runs_.members[i]];
      WorkItem item{tile.sequence,
                    kv_head,
                    tile.q_begin,
                    tile.q_end,
                    run.chunk_begin * kKvChunk,
                    end_key(run, tile),
                    -1,
                    -1};
      if (place.merge >= 0) {
        const int chunks = tile.end_chunk() - tile.first_chunk();
        item.partial = place.partial + (kv_head * chunks + run.chunk_begin - tile.first_chunk()) *
                                           slots_a_chunk(tile);
        item.merge = place.merge + kv_head;
      }
      plan_.items.push_back(item);
    }
    if (runs_.size(run) > 1) plan_.num_shared_items += runs_.size(run);
  }

  const int num_kv_heads_, group_;
  const PlanTraits& traits_;
  const std::vector<Tile>& tiles_;
  Runs runs_;
  AttentionPlan& plan_;
  std::vector<Place> places_;  // of the tiles
  std::vector<Piece> pieces_;
  int64_t share_ = 0;
};

void add_statistics(const AttentionDesc& desc, AttentionPlan& plan) {
  const int64_t dims = int64_t{desc.head_dim} + desc.value_dim();
  int64_t pairs = 0, keys = 0;
  for (const Sequence& sequence : plan.sequences) {
    for (int64_t row = 0; row < sequence.q_len; ++row) {
      const KeyRange range = visible_keys(desc, sequence, row);
      pairs = plus(pairs, range.end - range.begin);
    }
    if (sequence.q_len > 0)
      keys += std::max<int64_t>(0, visible_keys(desc, sequence, sequence.q_len - 1).end -
                                       visible_keys(desc, sequence, 0).begin);
  }
  plan.flops = times(times(2 * dims, desc.num_heads), pairs);
  plan.kv_bytes =
      times(times(keys, desc.num_kv_heads), dims * static_cast<int64_t>(size_of(desc.kv_dtype)));
}

void add_extents(const AttentionDesc& desc, const AttentionBatch& batch, AttentionPlan& plan) {
  const int n = batch.batch_size;
  plan.dense = desc.block_size == 0 && !batch.cu_seqlens_k;
  if (plan.dense) {
    plan.total_q = batch.dense_q;
    plan.total_k = batch.dense_k;
    return;
  }
  plan.total_q = batch.cu_seqlens_q ? batch.cu_seqlens_q[n] : n;
  if (desc.block_size == 0) {
    plan.total_k = batch.cu_seqlens_k[n];
    return;
  }
  for (int b = 0; b < n; ++b) {
    const int64_t used = (int64_t{batch.seq_lens[b]} + desc.block_size - 1) / desc.block_size;
    plan.sequences[b].kv_row = static_cast<int32_t>(plan.block_ids.size());
    if (used == 0) continue;
    const int32_t* row = batch.block_table + b * batch.block_table_stride;
    plan.block_ids.insert(plan.block_ids.end(), row, row + used);
    for (int64_t i = first_visible_block(desc, plan.sequences[b]); i < used; ++i)
      plan.max_block_id = std::max(plan.max_block_id, row[i]);
  }
}

}  // namespace

AttentionPlan plan(const AttentionDesc& desc, const AttentionBatch& batch,
                   const PlanTraits& traits) {
  validate(desc, batch);
  AttentionPlan plan;
  plan.desc = desc;
  plan.sequences = make_sequences(desc, batch);
  add_extents(desc, batch, plan);
  const std::vector<Tile> tiles = make_tiles(desc, plan.sequences, traits);
  Cutter(desc, traits, tiles, find_shared_runs(desc, plan, tiles, traits.sharing), plan).cut();
  add_statistics(desc, plan);
  return plan;
}

}  // namespace quire
