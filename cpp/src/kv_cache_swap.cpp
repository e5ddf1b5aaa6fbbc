// SPDX-License-Identifier: Apache-2.0
// Sequences that wait in host memory.
#include <utility>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace quire {

bool KVCacheManager::is_swapped_out(SequenceId id) const {
  const std::lock_guard guard(mutex_);
  return get(id).away == Away::kSwapped;
}

std::optional<KVCacheManager::BlockPairs> KVCacheManager::swap_out(SequenceId id) {
  const std::lock_guard guard(mutex_);
  check_here("swap_out", get(id));
  QUIRE_CHECK_ARG(host_, "swap_out: expected a manager with num_host_blocks > 0");
  check_one_group("swap_out");
  settle();
  Sequence& seq = get(id);
  Swapped swapped{seq.num_computed, {}};
  swapped.slots.resize(static_cast<size_t>(seq.table.blocks_for(seq.num_computed)));
  if (!host_->allocate(swapped.slots, [](int32_t victim) { return victim; })) return std::nullopt;
  BlockPairs pairs;
  for (size_t i = 0; i < swapped.slots.size(); ++i)
    pairs.push_back({seq.table[static_cast<int32_t>(i)], swapped.slots[i]});
  give_back(seq);
  seq.num_computed = seq.num_planned = 0;
  seq.away = Away::kSwapped;
  swapped_[static_cast<int32_t>(id.index())] = std::move(swapped);
  return pairs;
}

std::optional<KVCacheManager::BlockPairs> KVCacheManager::swap_in(SequenceId id) {
  const std::lock_guard guard(mutex_);
  settle();
  Sequence& seq = get(id);
  QUIRE_CHECK_ARG(seq.away == Away::kSwapped, "swap_in: seq: expected one that is swapped out");
  offloads_.clear();
  const auto found = swapped_.find(static_cast<int32_t>(id.index()));
  const Swapped& swapped = found->second;
  const int64_t num_computed = swapped.num_computed;
  const std::span<const int32_t> computed(seq.tokens.data(), static_cast<size_t>(num_computed));
  path_.resize(static_cast<size_t>(find_path(seq.root, computed) / block_size_));
  int32_t num_idle = 0;
  for (int32_t block : path_) num_idle += allocator_.refcount(block) == 0;
  const int64_t num_missing = static_cast<int64_t>(swapped.slots.size() - path_.size());
  if (num_missing > allocator_.num_available() - num_idle) return std::nullopt;
  for (int32_t block : path_) {
    allocator_.share(block);
    on_hit(block);
  }
  seq.table.append(path_);
  allocate(num_missing);
  seq.table.append(new_blocks_);
  BlockPairs pairs;
  for (int64_t i = 0; i < num_missing; ++i)
    pairs.push_back({swapped.slots[path_.size() + i], new_blocks_[i]});
  const int32_t num_whole = static_cast<int32_t>(num_computed / block_size_);
  for (int32_t i = static_cast<int32_t>(path_.size()); cache_ && i < num_whole; ++i)
    publish(seq, i);
  drop_slots(seq);
  seq.num_computed = num_computed;
  return pairs;
}

// Gives up what is kept in host memory for a sequence; it has to be computed again then.
void KVCacheManager::drop_slots(Sequence& seq) {
  const auto found = swapped_.find(static_cast<int32_t>(&seq - sequences_.data()));
  for (int32_t slot : found->second.slots) host_->release(slot);
  swapped_.erase(found);
  seq.away = Away::kNo;
}

}  // namespace quire
