// SPDX-License-Identifier: Apache-2.0
// What a KVCacheManager is asked with, and answers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "quire/eviction_policy.h"
#include "quire/layer_groups.h"

namespace quire {

// A safe handle: one that was freed, or comes from another manager, is refused.
struct SequenceId {
  static constexpr int kIndexBits = 24;  // below a serial number

  int64_t value = 0;  // unique in the process; 0: no sequence

  size_t index() const { return static_cast<size_t>(value & ((int64_t{1} << kIndexBits) - 1)); }
  bool operator==(const SequenceId&) const = default;
};

// A prefix that create() would find. It may end inside a block, whose leading tokens are copied.
// The idle ones of its whole blocks are in nobody's use: they count as available until someone
// takes the prefix.
struct PrefixMatch {
  int64_t num_tokens = 0;
  int32_t num_idle_blocks = 0;
  int32_t num_blocks = 0;  // whole ones, of all groups
};

// How long the blocks of a sequence are worth keeping once nobody uses them. Lower priorities are
// evicted first, and of one priority the least recently used. `ttl` seconds after a block was
// given up it counts as of the lowest priority of all. Of several sequences that held a block, the
// highest priority counts, with its ttl.
struct Retention {
  static constexpr int32_t kMaxPriority = 100;
  int32_t priority = 0;  // 0 ... kMaxPriority
  double ttl = std::numeric_limits<double>::infinity();
};

// Block counts add up: free + used + cached == num_blocks. The token counts and fenced_blocks are
// gathered while other threads go on: they may miss what those change meanwhile.
struct KVCacheStats {
  int32_t num_blocks, block_size;
  int32_t free_blocks, used_blocks, cached_blocks;
  int32_t high_water_blocks;    // most blocks ever used at once
  int64_t deferred_refs;        // references that wait for retire(); their blocks count as used
  int64_t used_tokens;          // computed tokens of live sequences and pins, in shared blocks once
  int64_t waste_tokens;         // room in used blocks beyond those
  int64_t prefix_query_tokens;  // asked of the prefix cache by create(),
  int64_t prefix_hit_tokens;    // and found in it
  int64_t evicted_blocks;       // cached blocks whose contents were given up
  int32_t pinned_blocks;        // of the used ones, those that pin() holds
  int32_t fenced_blocks;        // of the used ones, those that wait for retire() alone
  int64_t lost_events;          // that nobody took in time
  int64_t host_hit_tokens;      // fetched from stores of this tier,
  int64_t file_hit_tokens;      // and of this
  int32_t num_host_blocks;      // for sequences that are swapped out,
  int32_t swapped_blocks;       // and how many of them are taken
};

struct KVCacheOptions {
  Eviction eviction = Eviction::kLru;
  int32_t event_capacity = 0;           // events kept for take_events(); 0: none are made
  int32_t num_host_blocks = 0;          // for swap_out()
  std::vector<LayerGroup> groups = {};  // the first is full attention; none: that one alone
};

// Blocks of one layer group.
struct LayerGroupStats {
  int32_t used_blocks = 0;    // that sequences hold, each counted once
  int32_t cached_blocks = 0;  // that nobody holds, kept for their contents
};

}  // namespace quire
