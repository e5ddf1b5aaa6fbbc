// SPDX-License-Identifier: Apache-2.0
// The planner: a batch -> a list of work items. Pure; reads lengths and block ids, no tensor.
//
// Query rows are cut into tiles and, where one tile's keys would keep a worker busy for too long,
// keys into runs of whole chunks (kKvChunk). Chunk boundaries are counted from the start of the
// sequence, so cutting differently never changes a bit of the result.
#include <algorithm>
#include <limits>

#include "quire/attention.h"
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

// Query rows [q_begin, q_end) of a sequence and the keys that at least one of them sees.
struct Tile {
  int32_t sequence;
  int32_t q_begin, q_end;
  int32_t kv_begin, kv_end;
  int64_t cost;  // for each kv head, in rows x keys
};

struct KeyRange {
  int64_t begin, end;
};

// Keys that query row `row` sees through causality and window.
KeyRange visible_keys(const AttentionDesc& desc, const Sequence& sequence, int64_t row) {
  const int64_t position = int64_t{sequence.seq_len} - sequence.q_len + row;
  const int right = desc.causal ? 0 : desc.window_right;  // causal with any right window: 0
  int64_t begin = desc.window_left < 0 ? 0 : std::max<int64_t>(0, position - desc.window_left);
  int64_t end =
      right < 0 ? sequence.seq_len : std::min<int64_t>(sequence.seq_len, position + right + 1);
  return {begin, std::max(begin, end)};
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

// Fewest rows that a tile's keys are charged for: a decode row is bound by reading them.
constexpr int64_t kMinRowCost = 16;

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
      const int64_t begin = visible_keys(desc, sequence, q_begin).begin;
      const int64_t end = visible_keys(desc, sequence, q_end - 1).end;
      Tile tile{static_cast<int32_t>(b), q_begin, q_end, 0, 0, 1};
      if (begin < end) {
        tile.kv_begin = static_cast<int32_t>(begin / kKvChunk * kKvChunk);
        tile.kv_end = static_cast<int32_t>(end);
        const int64_t rows = int64_t{q_end - q_begin} * group;
        tile.cost = times(end - begin, std::max(kMinRowCost, rows));
      }
      tiles.push_back(tile);
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
  return tiles;
}

// Chunks of a tile's keys. Lengths may be as large as an int32 is: nothing is added before
// dividing.
int32_t num_chunks(const Tile& tile) {
  const int32_t keys = tile.kv_end - tile.kv_begin;
  return keys / kKvChunk + (keys % kKvChunk > 0);
}

// Work items of a tile for one kv head; with more than one they share a MergeItem.
void emit(const Tile& tile, int kv_head, int num_items, int group, AttentionPlan& plan) {
  const int chunks = num_chunks(tile);
  if (num_items <= 1) {
    plan.items.push_back(
        {tile.sequence, kv_head, tile.q_begin, tile.q_end, tile.kv_begin, tile.kv_end, -1, -1});
    return;
  }
  const int chunks_per_item = (chunks + num_items - 1) / num_items;
  const int merge = static_cast<int>(plan.merges.size());
  int items = 0;
  for (int chunk = 0; chunk < chunks; chunk += chunks_per_item, ++items) {
    const int begin = tile.kv_begin + chunk * kKvChunk;
    const int64_t end = begin + int64_t{chunks_per_item} * kKvChunk;
    plan.items.push_back({tile.sequence, kv_head, tile.q_begin, tile.q_end, begin,
                          static_cast<int32_t>(std::min<int64_t>(tile.kv_end, end)),
                          plan.num_partials + chunk, merge});
  }
  plan.merges.push_back(
      {tile.sequence, kv_head, tile.q_begin, tile.q_end, plan.num_partials, chunks, items});
  plan.num_partials += chunks;
  plan.partial_rows = std::max(plan.partial_rows, (tile.q_end - tile.q_begin) * group);
}

void add_statistics(const AttentionDesc& desc, AttentionPlan& plan) {
  const int64_t dims = int64_t{desc.head_dim} + (desc.head_dim_v ? desc.head_dim_v : desc.head_dim);
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
  }
  for (const int32_t id : plan.block_ids) plan.max_block_id = std::max(plan.max_block_id, id);
}

}  // namespace

AttentionPlan plan(const AttentionDesc& desc, const AttentionBatch& batch,
                   const PlanTraits& traits) {
  validate(desc, batch);
  AttentionPlan plan;
  plan.sequences = make_sequences(desc, batch);
  add_extents(desc, batch, plan);
  const std::vector<Tile> tiles = make_tiles(desc, plan.sequences, traits);

  // A tile is split when it alone would take more than a quarter of a worker's fair share.
  int64_t total_cost = 0;
  for (const Tile& tile : tiles) total_cost = plus(total_cost, times(tile.cost, desc.num_kv_heads));
  const int64_t share = std::max<int64_t>(1, total_cost / (4 * int64_t{traits.parallelism}));
  plan.items.reserve(tiles.size() * desc.num_kv_heads);
  for (const Tile& tile : tiles) {
    const int64_t wanted = traits.parallelism == 1 ? 1 : plus(tile.cost, share - 1) / share;
    const int chunks = num_chunks(tile);
    for (int kv_head = 0; kv_head < desc.num_kv_heads; ++kv_head)
      emit(tile, kv_head, static_cast<int>(std::min<int64_t>(wanted, chunks)),
           desc.num_heads / desc.num_kv_heads, plan);
  }
  add_statistics(desc, plan);
  return plan;
}

}  // namespace quire
