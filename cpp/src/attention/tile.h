// SPDX-License-Identifier: Apache-2.0
// What the planner deals with before it is cut into work items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "quire/attention.h"

namespace quire {

struct KeyRange {
  int64_t begin, end;
};

// Keys that query row `row` sees through causality and window.
inline KeyRange visible_keys(const AttentionDesc& desc, const Sequence& sequence, int64_t row) {
  const int64_t position = int64_t{sequence.seq_len} - sequence.q_len + row;
  const int right = desc.causal ? 0 : desc.window_right;  // causal with any right window: 0
  int64_t begin = desc.window_left < 0 ? 0 : std::max<int64_t>(0, position - desc.window_left);
  int64_t end =
      right < 0 ? sequence.seq_len : std::min<int64_t>(sequence.seq_len, position + right + 1);
  return {begin, std::max(begin, end)};
}

// The first block of a paged sequence that any query row sees; table entries before it may be
// anything: blocks that a window has left behind.
inline int64_t first_visible_block(const AttentionDesc& desc, const Sequence& sequence) {
  return visible_keys(desc, sequence, 0).begin / desc.block_size;
}

// Query rows [q_begin, q_end) of a sequence and the keys that at least one of them sees.
struct Tile {
  int32_t sequence;
  int32_t q_begin, q_end;
  int32_t kv_begin, kv_end;        // begins with a chunk
  int32_t whole_begin, whole_end;  // chunks that every row sees whole
  int32_t rows;                    // query rows x heads of a kv head

  int first_chunk() const { return kv_begin / kKvChunk; }
  int end_chunk() const { return kv_end / kKvChunk + (kv_end % kKvChunk > 0); }
};

// Tiles members[member_begin, member_end) against chunks [chunk_begin, chunk_end). Several tiles
// are of different sequences, have the same blocks there and see all of it.
struct Run {
  int32_t member_begin, member_end;
  int32_t chunk_begin, chunk_end;
};

struct Runs {
  std::vector<int32_t> members;  // indices of tiles
  std::vector<Run> runs;

  int size(const Run& run) const { return run.member_end - run.member_begin; }
};

// The cost of a chunk in rows of arithmetic: below this many rows it is that of reading the keys.
constexpr int64_t kReadCost = 16;

// The chunks that tiles of a paged batch read in common and that are worth it, those of each tile
// in rising order. Linear in the batch and in the blocks that are compared: the shared ones.
Runs find_shared_runs(const AttentionDesc& desc, const AttentionPlan& plan,
                      const std::vector<Tile>& tiles, Sharing sharing);

}  // namespace quire
