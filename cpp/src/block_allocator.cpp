// SPDX-License-Identifier: Apache-2.0
// Two intrusive lists over one pair of link arrays: a block is in at most one of them.
#include "quire/block_allocator.h"

#include <algorithm>

#include "quire/error.h"

namespace quire {

BlockAllocator::BlockAllocator(int32_t num_blocks, int32_t block_size)
    : num_blocks_(num_blocks), block_size_(block_size), num_free_(num_blocks) {
  QUIRE_CHECK_ARG(num_blocks >= 1 && num_blocks < INT32_MAX - 1,
                  "BlockAllocator: num_blocks: expected 1 or more, got ", num_blocks);
  QUIRE_CHECK_ARG(block_size >= 1, "BlockAllocator: block_size: expected 1 or more, got ",
                  block_size);
  const size_t count = static_cast<size_t>(num_blocks);
  prev_.resize(count + 2);
  next_.resize(count + 2);
  refcount_.resize(count);
  num_tokens_.resize(count);
  cached_.resize(count);
  for (int32_t i = 0; i < num_blocks; ++i) {
    prev_[i] = i - 1;
    next_[i] = i + 1;
  }
  prev_[0] = free_list();
  next_[free_list()] = 0;
  prev_[free_list()] = num_blocks - 1;
  prev_[lru_list()] = next_[lru_list()] = lru_list();
}

void BlockAllocator::insert_after(int32_t position, int32_t block) {
  prev_[block] = position;
  next_[block] = next_[position];
  prev_[next_[position]] = block;
  next_[position] = block;
}

void BlockAllocator::unlink(int32_t block) {
  next_[prev_[block]] = next_[block];
  prev_[next_[block]] = prev_[block];
}

std::optional<size_t> BlockAllocator::allocate(std::span<int32_t> blocks) {
  if (blocks.size() > static_cast<size_t>(num_available())) return std::nullopt;
  const size_t num_from_free = std::min(blocks.size(), static_cast<size_t>(num_free_));
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int32_t block = next_[i < num_from_free ? free_list() : lru_list()];
    unlink(block);
    refcount_[block] = 1;
    num_tokens_[block] = 0;
    cached_[block] = 0;
    blocks[i] = block;
  }
  const size_t num_evicted = blocks.size() - num_from_free;
  num_free_ -= static_cast<int32_t>(num_from_free);
  num_cached_ -= static_cast<int32_t>(num_evicted);
  high_water_ = std::max(high_water_, num_used());
  return num_evicted;
}

void BlockAllocator::share(int32_t block) {
  if (refcount_[block]++ > 0) return;
  unlink(block);
  --num_cached_;
  num_used_tokens_ += num_tokens_[block];
  high_water_ = std::max(high_water_, num_used());
}

void BlockAllocator::release(int32_t block) {
  if (--refcount_[block] > 0) return;
  num_used_tokens_ -= num_tokens_[block];
  if (cached_[block]) {
    insert_after(prev_[lru_list()], block);
    ++num_cached_;
  } else {
    num_tokens_[block] = 0;
    insert_after(free_list(), block);
    ++num_free_;
  }
}

int32_t BlockAllocator::check_list(int32_t list, bool cached) const {
  int32_t count = 0;
  for (int32_t last = list, block = next_[list]; block != list;
       last = block, block = next_[block]) {
    QUIRE_INVARIANT(block >= 0 && block < num_blocks_, "list holds ", block);
    QUIRE_INVARIANT(prev_[block] == last, "block ", block, ": broken links");
    QUIRE_INVARIANT(refcount_[block] == 0, "block ", block, ": listed and referenced");
    QUIRE_INVARIANT(is_cached(block) == cached, "block ", block, ": in the wrong list");
    QUIRE_INVARIANT(cached || num_tokens_[block] == 0, "block ", block, ": free with tokens");
    QUIRE_INVARIANT(++count <= num_blocks_, "a list runs in circles");
  }
  return count;
}

void BlockAllocator::validate() const {
  QUIRE_INVARIANT(check_list(free_list(), false) == num_free_, "num_free is off");
  QUIRE_INVARIANT(check_list(lru_list(), true) == num_cached_, "num_cached is off");
  int32_t num_referenced = 0;
  int64_t num_tokens_held = 0;
  for (int32_t block = 0; block < num_blocks_; ++block) {
    QUIRE_INVARIANT(refcount_[block] >= 0, "block ", block, ": refcount ", refcount_[block]);
    QUIRE_INVARIANT(num_tokens_[block] >= 0 && num_tokens_[block] <= block_size_, "block ", block,
                    ": holds ", num_tokens_[block], " tokens");
    if (refcount_[block] == 0) continue;
    ++num_referenced;
    num_tokens_held += num_tokens_[block];
  }
  QUIRE_INVARIANT(num_referenced == num_used(), "a block is neither free, used nor cached");
  QUIRE_INVARIANT(num_tokens_held == num_used_tokens_, "num_used_tokens is off");
  QUIRE_INVARIANT(num_used() <= high_water_ && high_water_ <= num_blocks_, "high_water is off");
}

}  // namespace quire
