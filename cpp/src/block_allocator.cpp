// SPDX-License-Identifier: Apache-2.0
// Intrusive lists over one pair of links a block: it is in at most one of them.
#include "quire/block_allocator.h"

#include <bit>
#include <numeric>

#include "quire/error.h"

namespace quire {

BlockAllocator::BlockAllocator(int32_t num_blocks, int32_t block_size, Eviction eviction)
    : num_blocks_(num_blocks), block_size_(block_size), num_free_(num_blocks) {
  QUIRE_CHECK_ARG(num_blocks >= 1, "BlockAllocator: num_blocks: expected 1 or more, got ",
                  num_blocks);
  QUIRE_CHECK_ARG(num_blocks <= kMaxBlocks, "BlockAllocator: num_blocks: expected at most ",
                  kMaxBlocks, ", got ", num_blocks);
  QUIRE_CHECK_ARG(block_size >= 1, "BlockAllocator: block_size: expected 1 or more, got ",
                  block_size);
  static_assert(sizeof(Entry) == 8);
  if (eviction == Eviction::kReuseLru) reuse_.emplace(num_blocks);
  entries_.resize(static_cast<size_t>(num_blocks) + kNumLevels * num_classes());
  for (int32_t at = num_blocks; at < static_cast<int32_t>(entries_.size()); ++at)
    entries_[at].prev = entries_[at].next = static_cast<uint32_t>(at);
  for (int32_t i = 0; i < num_blocks; ++i)
    entries_[i] = {static_cast<uint32_t>(num_blocks - i), static_cast<uint32_t>(i + 1), kStartLevel,
                   0};
}

void BlockAllocator::insert_after(int32_t position, int32_t block) {
  const int32_t after = next(position);
  entries_[block].prev = static_cast<uint32_t>(position);
  entries_[block].next = static_cast<uint32_t>(after);
  entries_[after].prev = static_cast<uint32_t>(block);
  entries_[position].next = static_cast<uint32_t>(block);
}

int32_t BlockAllocator::victim_of_classes() {
  for (;; ++lowest_level_) {
    std::array<int32_t, ReuseClasses::kNumClasses> oldest;
    for (int32_t k = 0; k < ReuseClasses::kNumClasses; ++k) {
      const int32_t list = cached_list(lowest_level_, k);
      oldest[k] = is_empty(list) ? ReuseClasses::kNone : next(list);
    }
    if (const int32_t block = reuse_->choose(oldest); block != ReuseClasses::kNone) return block;
  }
}

// Run by run: within one no load waits for another.
void BlockAllocator::take_free(std::span<int32_t> blocks) {
  num_free_ -= static_cast<int32_t>(blocks.size());
  while (!blocks.empty()) {
    const int32_t first = first_free_;
    const int32_t count =
        static_cast<int32_t>(std::min<size_t>(entries_[first].prev, blocks.size()));
    first_free_ = next(first + count - 1);
    std::fill_n(entries_.begin() + first, count, Entry{1, 0, kStartLevel, 1});
    std::iota(blocks.begin(), blocks.begin() + count, first);
    blocks = blocks.subspan(static_cast<size_t>(count));
  }
}

// Sends the last of `blocks`, as long as they are held once and worth keeping, to the end of a list
// that they are all of. Returns how many are left.
size_t BlockAllocator::release_cached(std::span<const int32_t> blocks) {
  size_t left = blocks.size();
  if (left == 0) return 0;
  const uint64_t level = entries_[blocks.back()].level;
  const uint32_t list = static_cast<uint32_t>(cached_list(static_cast<int32_t>(level)));
  uint32_t last = entries_[list].prev;
  for (; left > 0 && !reuse_; --left) {
    const uint32_t block = static_cast<uint32_t>(blocks[left - 1]);
    const Entry entry = entries_[block];
    if (entry.prev != 1 || entry.next == 0 || entry.level != level) break;
    entries_[last].next = block;
    entries_[block] = {last, list, level, 0};
    last = block;
  }
  if (left == blocks.size()) return left;
  entries_[list].prev = last;
  lowest_level_ = std::min(lowest_level_, static_cast<int32_t>(level));
  num_cached_ += static_cast<int32_t>(blocks.size() - left);
  return left;
}

// Most are held once and not worth keeping. The head of the free list stays in registers for those.
void BlockAllocator::release(std::span<const int32_t> blocks) {
  Entry* const entries = entries_.data();
  for (size_t i = blocks.size(); i > 0;) {
    int32_t first = first_free_;
    uint32_t run = num_free_ > 0 ? entries[first].prev : 0;
    const size_t begin = i;
    for (; i > 0; --i) {
      const int32_t block = blocks[i - 1];
      const Entry entry = entries[block];
      if (entry.prev != 1 || entry.next != 0) break;
      run = first == block + 1 ? run + 1 : 1;
      entries[block] = {run, static_cast<uint32_t>(first), kStartLevel, 0};
      first = block;
    }
    first_free_ = first;
    num_free_ += static_cast<int32_t>(begin - i);
    i = release_cached(blocks.first(i));
    if (i > 0 && (reuse_ || entries[blocks[i - 1]].prev > 1)) release(blocks[--i]);
  }
}

void BlockAllocator::revive(int32_t block) {
  unlink(block);
  entries_[block] = {1, 1, entries_[block].level, 1};
  --num_cached_;
  high_water_ = std::max(high_water_, num_used());
}

void BlockAllocator::make_cached(int32_t block) {
  entries_[block].is_used = 0;
  if (reuse_) reuse_->release(block);
  insert_after(prev(list_of(block)), block);
  lowest_level_ = std::min(lowest_level_, level(block));
  ++num_cached_;
}

void BlockAllocator::set_level(int32_t block, int32_t level) {
  Entry& entry = entries_[block];
  entry.level = static_cast<uint32_t>(level);
  if (entry.is_used) return;
  unlink(block);
  if (reuse_) reuse_->release(block);
  insert_after(prev(list_of(block)), block);
  lowest_level_ = std::min(lowest_level_, level);
}

std::vector<int64_t> BlockAllocator::save() const {
  std::vector<int64_t> numbers = {num_blocks_, num_free_,   first_free_,
                                  num_cached_, high_water_, lowest_level_};
  for (const Entry& entry : entries_) numbers.push_back(std::bit_cast<int64_t>(entry));
  return numbers;
}

void BlockAllocator::load(std::span<const int64_t> numbers) {
  constexpr size_t kNumCounts = 6;
  QUIRE_CHECK_ARG(numbers.size() == kNumCounts + entries_.size() && numbers[0] == num_blocks_,
                  "restore: snapshot: allocator: expected ", kNumCounts + entries_.size(),
                  " numbers of ", num_blocks_, " blocks, got ", numbers.size());
  for (size_t i = 1; i < kNumCounts; ++i)
    QUIRE_CHECK_ARG(numbers[i] >= 0 && numbers[i] <= std::max(num_blocks_, kNumLevels),
                    "restore: snapshot: allocator: expected 0 or more, got ", numbers[i]);
  for (size_t i = 0; i < entries_.size(); ++i) {
    entries_[i] = std::bit_cast<Entry>(numbers[kNumCounts + i]);
    QUIRE_CHECK_ARG(entries_[i].level < kNumLevels && entries_[i].next < entries_.size(),
                    "restore: snapshot: allocator: expected a block, got ", numbers[i]);
  }
  QUIRE_CHECK_ARG(numbers[5] <= kNumLevels, "restore: snapshot: allocator: expected a level, got ",
                  numbers[5]);
  num_free_ = static_cast<int32_t>(numbers[1]);
  first_free_ = static_cast<int32_t>(numbers[2]);
  num_cached_ = static_cast<int32_t>(numbers[3]);
  high_water_ = static_cast<int32_t>(numbers[4]);
  lowest_level_ = static_cast<int32_t>(numbers[5]);
}

int32_t BlockAllocator::check_list(int32_t level, int32_t reuse_class) const {
  int32_t count = 0;
  const int32_t list = cached_list(level, reuse_class);
  for (int32_t last = list, block = next(list); block != list; last = block, block = next(block)) {
    QUIRE_INVARIANT(block >= 0 && block < num_blocks_, "list holds ", block);
    QUIRE_INVARIANT(prev(block) == last, "block ", block, ": broken links");
    QUIRE_INVARIANT(!entries_[block].is_used, "block ", block, ": listed and referenced");
    QUIRE_INVARIANT(list_of(block) == list, "block ", block, ": in the wrong list");
    QUIRE_INVARIANT(++count <= num_blocks_, "a list runs in circles");
  }
  return count;
}

void BlockAllocator::check_free_list() const {
  int32_t block = first_free_;
  for (int32_t i = 0; i < num_free_; ++i, block = next(block)) {
    QUIRE_INVARIANT(block >= 0 && block < num_blocks_, "the free list holds ", block);
    QUIRE_INVARIANT(!entries_[block].is_used, "block ", block, ": free and referenced");
    const bool goes_on = i + 1 < num_free_ && next(block) == block + 1;
    QUIRE_INVARIANT(prev(block) == 1 || (goes_on && prev(block) == 1 + prev(block + 1)), "block ",
                    block, ": a run of ", prev(block), " free blocks is none");
  }
}

void BlockAllocator::validate() const {
  check_free_list();
  int32_t num_cached = 0;
  for (int32_t level = 0; level < kNumLevels; ++level) {
    int32_t count = 0;
    for (int32_t k = 0; k < num_classes(); ++k) count += check_list(level, k);
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
