// SPDX-License-Identifier: Apache-2.0
// BlockAllocator: which blocks of the KV cache are free, in use, or kept for their contents.
//
// Every block is in exactly one state:
//   free    no references, no contents worth keeping; in the free list
//   used    one reference or more
//   cached  no references, but its contents may be wanted again; in the list of its level (and,
//           under Eviction::kReuseLru, of its class), in the order in which they were given up. The
//           lowest level is evicted first.
// It knows ids and counts only; what a block holds is the prefix cache's affair.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "quire/eviction_policy.h"

namespace quire {

// 8 bytes a block, 24 under kReuseLru. Every operation on a block is O(1).
class BlockAllocator {
 public:
  static constexpr int32_t kNumLevels = 127;  // 0 ... 126
  static constexpr int32_t kMaxBlocks = (1 << 28) - kNumLevels * ReuseClasses::kNumClasses - 1;

  BlockAllocator(int32_t num_blocks, int32_t block_size, Eviction eviction = Eviction::kLru);

  // Fills `blocks` with ids that hold one reference each, or changes nothing and returns false.
  // Free blocks are taken first, the last freed first; then cached ones. For each of those
  // evict(victim) names the block to take, the victim or another cached one, and forgets what it
  // holds.
  template <class Evict>
  bool allocate(std::span<int32_t> blocks, Evict evict) {
    if (blocks.size() > static_cast<size_t>(num_available())) return false;
    const size_t num_from_free = std::min(blocks.size(), static_cast<size_t>(num_free_));
    take_free(blocks.first(num_from_free));
    for (int32_t& block : blocks.subspan(num_from_free)) take_cached(block = evict(victim()));
    high_water_ = std::max(high_water_, num_used());
    return true;
  }

  // References more, one or `count`. A cached block leaves its list, wherever in it it lies.
  void share(int32_t block, int32_t count = 1) {
    if (!entries_[block].is_used) {
      revive(block);
      --count;
    }
    entries_[block].prev += static_cast<uint32_t>(count);
  }

  // One reference less. The last one sends the block to the end of its level's list if its
  // contents are worth keeping, else to the free list.
  void release(int32_t block) {
    const Entry entry = entries_[block];
    if (entry.prev > 1)
      entries_[block].prev = entry.prev - 1;
    else if (entry.next != 0)
      make_cached(block);
    else
      make_free(block);
  }

  // release() of each, the last first.
  void release(std::span<const int32_t> blocks);

  // The contents of a cached block nobody holds are worth nothing any more: it is free.
  void forget(int32_t block) {
    unlink(block);
    --num_cached_;
    make_free(block);
  }

  // Whether the contents of a used block are worth keeping once nobody holds it.
  void mark_cached(int32_t block) { entries_[block].next = 1; }
  void unmark_cached(int32_t block) { entries_[block].next = 0; }

  // A used or cached block's level; allocated blocks start at kStartLevel.
  static constexpr int32_t kStartLevel = 1;
  int32_t level(int32_t block) const { return static_cast<int32_t>(entries_[block].level); }
  void set_level(int32_t block, int32_t level);

  // Of Eviction::kReuseLru, else null: whoever knows the contents says what they are, and what hit.
  ReuseClasses* reuse() { return reuse_ ? &*reuse_ : nullptr; }
  const ReuseClasses* reuse() const { return reuse_ ? &*reuse_ : nullptr; }
  // Whether one reference alone is on a used block, and it is not worth keeping.
  bool is_own(int32_t block) const {
    return entries_[block].prev == 1 && entries_[block].next == 0;
  }
  // Asks for the memory of a block whose state is about to change.
  void prefetch(int32_t block) const { __builtin_prefetch(&entries_[block], 1); }

  int32_t refcount(int32_t block) const {
    return entries_[block].is_used ? static_cast<int32_t>(entries_[block].prev) : 0;
  }
  bool is_cached(int32_t block) const {  // of a used block
    return entries_[block].is_used && entries_[block].next != 0;
  }

  int32_t num_blocks() const { return num_blocks_; }
  int32_t block_size() const { return block_size_; }
  int32_t num_free() const { return num_free_; }
  int32_t num_cached() const { return num_cached_; }
  int32_t num_used() const { return num_blocks_ - num_free_ - num_cached_; }
  int32_t num_available() const { return num_free_ + num_cached_; }  // what allocate() can give
  int32_t high_water() const { return high_water_; }  // most blocks ever used at once
  int64_t num_bytes() const {
    return static_cast<int64_t>(entries_.size() * sizeof(Entry)) +
           (reuse_ ? reuse_->num_bytes() : 0);
  }

  // Everything, as integers, and back: for snapshots. load() throws InvalidArgument for what
  // validate() does not see; the classes of reuse are apart.
  std::vector<int64_t> save() const;
  void load(std::span<const int64_t> numbers);

  // Walks everything; throws InvariantError.
  void validate() const;

 private:
  // A cached block's neighbours in its list; a free one's successor (next) and the length (prev) of
  // the run of consecutive ids that the list goes on with, itself included; a used one's references
  // (prev) and whether it is worth keeping (next).
  struct Entry {
    uint64_t prev : 28, next : 28, level : 7, is_used : 1;
  };

  // Lists of cached blocks are circular through sentinels that lie behind the blocks. The free
  // list is a stack.
  int32_t num_classes() const { return reuse_ ? ReuseClasses::kNumClasses : 1; }
  int32_t cached_list(int32_t level, int32_t reuse_class = 0) const {
    return num_blocks_ + level * num_classes() + reuse_class;
  }
  int32_t list_of(int32_t block) const {
    return cached_list(level(block), reuse_ ? reuse_->reuse_class(block) : 0);
  }
  bool is_empty(int32_t list) const { return next(list) == list; }
  int32_t next(int32_t block) const { return static_cast<int32_t>(entries_[block].next); }
  int32_t prev(int32_t block) const { return static_cast<int32_t>(entries_[block].prev); }
  void insert_after(int32_t position, int32_t block);
  void unlink(int32_t block) {
    const Entry entry = entries_[block];
    entries_[entry.prev].next = entry.next;
    entries_[entry.next].prev = entry.prev;
  }
  // A cached block of the lowest level that has any: the first, of its class.
  int32_t victim() {
    if (reuse_) return victim_of_classes();
    while (is_empty(cached_list(lowest_level_))) ++lowest_level_;
    return next(cached_list(lowest_level_));
  }
  int32_t victim_of_classes();
  size_t release_cached(std::span<const int32_t> blocks);
  void take_free(std::span<int32_t> blocks);
  void take_cached(int32_t block) {
    unlink(block);
    if (reuse_) reuse_->evict(block);
    entries_[block] = {1, 0, kStartLevel, 1};
    --num_cached_;
  }
  void revive(int32_t block);
  void make_cached(int32_t block);
  void make_free(int32_t block) {
    const uint32_t run = num_free_ > 0 && first_free_ == block + 1 ? entries_[block + 1].prev : 0;
    entries_[block] = {run + 1, static_cast<uint32_t>(first_free_), kStartLevel, 0};
    first_free_ = block;
    ++num_free_;
  }
  int32_t check_list(int32_t level, int32_t reuse_class) const;
  void check_free_list() const;

  int32_t num_blocks_;
  int32_t block_size_;
  int32_t num_free_;
  int32_t first_free_ = 0;
  int32_t num_cached_ = 0;
  int32_t high_water_ = 0;
  int32_t lowest_level_ = kNumLevels;  // no cached block is of a lower one
  std::optional<ReuseClasses> reuse_;
  std::vector<Entry> entries_;  // [num_blocks + kNumLevels * num_classes]
};

}  // namespace quire
