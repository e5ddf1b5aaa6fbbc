// SPDX-License-Identifier: Apache-2.0
#include "quire/eviction_policy.h"

#include <algorithm>

#include "quire/error.h"

namespace quire {
namespace {

constexpr int32_t kMemoryPerBlock = 2;

// What is kept of an id: 13 bits, and one that is always set, as 0 stands for nothing.
uint16_t tag_of(uint64_t id) { return static_cast<uint16_t>((id | 1) & 0x3fff); }

}  // namespace

BlockLists::BlockLists(int32_t num_blocks, int32_t num_lists) : num_blocks_(num_blocks) {
  QUIRE_CHECK_ARG(num_blocks >= 1 && num_blocks < INT32_MAX - num_lists,
                  "EvictionPolicy: num_blocks: expected 1 or more, got ", num_blocks);
  links_.resize(static_cast<size_t>(num_blocks) + static_cast<size_t>(num_lists));
  for (int32_t at = num_blocks; at < num_blocks + num_lists; ++at) links_[at] = {at, at};
}

void BlockLists::push_back(int32_t list, int32_t block) {
  const int32_t end = num_blocks_ + list;
  const int32_t last = links_[end].prev;
  links_[block] = {last, end};
  links_[last].next = links_[end].prev = block;
}

void BlockLists::unlink(int32_t block) {
  const Links at = links_[block];
  links_[at.prev].next = at.next;
  links_[at.next].prev = at.prev;
}

int32_t BlockLists::front(int32_t list) const {
  const int32_t block = links_[num_blocks_ + list].next;
  return block < num_blocks_ ? block : -1;
}

ReuseLruPolicy::ReuseLruPolicy(int32_t num_blocks)
    : lists_(num_blocks, kNumClasses),
      stamps_(static_cast<size_t>(num_blocks)),
      memory_(static_cast<size_t>(num_blocks) * kMemoryPerBlock) {}

void ReuseLruPolicy::admit(int32_t block, uint64_t id, int32_t parent) {
  uint16_t& memory = memory_of(id);
  uint32_t reuse = 0;
  if (memory != 0 && memory >> 2 == tag_of(id)) {
    reuse = std::min<uint32_t>((memory & 3) + 1, kNumClasses - 1);
    memory = 0;
  }
  if (parent != kNone) reuse = std::min<uint32_t>(reuse, stamps_[parent].reuse);
  stamps_[block].reuse = reuse;
}

void ReuseLruPolicy::release(int32_t block) {
  stamps_[block].time = ++now_ & kTimeMask;
  lists_.push_back(static_cast<int32_t>(stamps_[block].reuse), block);
}

void ReuseLruPolicy::use(int32_t block) {
  lists_.unlink(block);
  if (stamps_[block].reuse < kNumClasses - 1) ++stamps_[block].reuse;
}

void ReuseLruPolicy::evict(int32_t block, uint64_t id) {
  lists_.unlink(block);
  memory_of(id) = static_cast<uint16_t>(tag_of(id) << 2 | stamps_[block].reuse);
}

int32_t ReuseLruPolicy::victim() const {
  int32_t best = kNone, best_class = 0;
  for (int32_t k = 0; k < kNumClasses; ++k) {
    const int32_t block = lists_.front(k);
    if (block == kNone) continue;
    // age / weight > best age / best weight; a tie stays with the lower class.
    if (best == kNone || age(block) * kWeights[best_class] > age(best) * kWeights[k]) {
      best = block;
      best_class = k;
    }
  }
  return best;
}

}  // namespace quire
