// SPDX-License-Identifier: Apache-2.0
// Intrusive lists over one pair of links a block: it is in at most one of them.
#include "quire/block_allocator.h"

#include "quire/error.h"

namespace quire {

BlockAllocator::BlockAllocator(int32_t num_blocks, int32_t block_size)
    : num_blocks_(num_blocks), block_size_(block_size), num_free_(num_blocks) {
  QUIRE_CHECK_ARG(num_blocks >= 1, "BlockAllocator: num_blocks: expected 1 or more, got ",
                  num_blocks);
  QUIRE_CHECK_ARG(num_blocks <= kMaxBlocks, "BlockAllocator: num_blocks: expected at most ",
                  kMaxBlocks, ", got ", num_blocks);
  QUIRE_CHECK_ARG(block_size >= 1, "BlockAllocator: block_size: expected 1 or more, got ",
                  block_size);
  static_assert(sizeof(Entry) == 8);
  entries_.resize(static_cast<size_t>(num_blocks) + kNumLevels + 1);
  for (int32_t list = num_blocks; list <= free_list(); ++list)
    entries_[list].prev = entries_[list].next = static_cast<uint32_t>(list);
  for (int32_t i = 0; i < num_blocks; ++i) {
    entries_[i].prev = static_cast<uint32_t>(i - 1);
    entries_[i].next = static_cast<uint32_t>(i + 1);
  }
  entries_[0].prev = entries_[num_blocks - 1].next = static_cast<uint32_t>(free_list());
  entries_[free_list()].next = 0;
  entries_[free_list()].prev = static_cast<uint32_t>(num_blocks - 1);
}

void BlockAllocator::insert_after(int32_t position, int32_t block) {
  const int32_t after = next(position);
  entries_[block].prev = static_cast<uint32_t>(position);
  entries_[block].next = static_cast<uint32_t>(after);
  entries_[after].prev = static_cast<uint32_t>(block);
  entries_[position].next = static_cast<uint32_t>(block);
}

void BlockAllocator::unlink(int32_t block) {
  entries_[prev(block)].next = entries_[block].next;
  entries_[next(block)].prev = entries_[block].prev;
}

int32_t BlockAllocator::victim() {
  while (next(cached_list(lowest_level_)) == cached_list(lowest_level_)) ++lowest_level_;
  return next(cached_list(lowest_level_));
}

// The first blocks of the free list leave it all at once.
void BlockAllocator::take_free(std::span<int32_t> blocks) {
  int32_t block = next(free_list());
  for (int32_t& taken : blocks) {
    taken = block;
    Entry& entry = entries_[block];
    block = static_cast<int32_t>(entry.next);
    entry = {1, 0, kStartLevel, 1};
  }
  entries_[free_list()].next = static_cast<uint32_t>(block);
  entries_[block].prev = static_cast<uint32_t>(free_list());
  num_free_ -= static_cast<int32_t>(blocks.size());
}

void BlockAllocator::take_cached(int32_t block) {
  unlink(block);
  entries_[block] = {1, 0, kStartLevel, 1};
  --num_cached_;
}

void BlockAllocator::revive(int32_t block) {
  unlink(block);
  entries_[block] = {1, 1, entries_[block].level, 1};
  --num_cached_;
  high_water_ = std::max(high_water_, num_used());
}

void BlockAllocator::make_idle(int32_t block) {
  Entry& entry = entries_[block];
  const bool is_cached = entry.next != 0;
  entry.is_used = 0;
  if (is_cached) {
    const int32_t level = static_cast<int32_t>(entry.level);
    insert_after(prev(cached_list(level)), block);
    lowest_level_ = std::min(lowest_level_, level);
    ++num_cached_;
  } else {
    insert_after(free_list(), block);
    ++num_free_;
  }
}

void BlockAllocator::set_level(int32_t block, int32_t level) {
  Entry& entry = entries_[block];
  entry.level = static_cast<uint32_t>(level);
  if (entry.is_used) return;
  unlink(block);
  insert_after(prev(cached_list(level)), block);
  lowest_level_ = std::min(lowest_level_, level);
}

int32_t BlockAllocator::check_list(int32_t list) const {
  int32_t count = 0;
  for (int32_t last = list, block = next(list); block != list; last = block, block = next(block)) {
    QUIRE_INVARIANT(block >= 0 && block < num_blocks_, "list holds ", block);
    QUIRE_INVARIANT(prev(block) == last, "block ", block, ": broken links");
    QUIRE_INVARIANT(!entries_[block].is_used, "block ", block, ": listed and referenced");
    QUIRE_INVARIANT(list == free_list() || cached_list(level(block)) == list, "block ", block,
                    ": in the wrong list");
    QUIRE_INVARIANT(++count <= num_blocks_, "a list runs in circles");
  }
  return count;
}

void BlockAllocator::validate() const {
  QUIRE_INVARIANT(check_list(free_list()) == num_free_, "num_free is off");
  int32_t num_cached = 0;
  for (int32_t level = 0; level < kNumLevels; ++level) {
    const int32_t count = check_list(cached_list(level));
    QUIRE_INVARIANT(count == 0 || level >= lowest_level_, "the lowest level is off");
    num_cached += count;
  }
  QUIRE_INVARIANT(num_cached == num_cached_, "num_cached is off");
  int32_t num_referenced = 0;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (!entries_[block].is_used) continue;
    ++num_referenced;
    QUIRE_INVARIANT(refcount(block) > 0, "block ", block, ": used without references");
  }
  QUIRE_INVARIANT(num_referenced == num_used(), "a block is neither free, used nor cached");
  QUIRE_INVARIANT(num_used() <= high_water_ && high_water_ <= num_blocks_, "high_water is off");
}

}  // namespace quire
