// SPDX-License-Identifier: Apache-2.0
// Sequences that wait in host memory.
#include <algorithm>
#include <utility>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"
#include "reserve_more.h"

namespace quire {

bool KVCacheManager::is_swapped_out(SequenceId id) const {
  const std::lock_guard guard(mutex_);
  return get(id).away == Away::kSwapped;
}

// The entries [first, end) of a group's table that a sequence goes on from.
std::array<int32_t, 2> KVCacheManager::needed_entries(int32_t group, int64_t num_computed) const {
  const int32_t end = static_cast<int32_t>((num_computed + block_size_ - 1) / block_size_);
  if (group == 0) return {0, end};
  if (companions_->is_state(group)) return {0, std::min(1, end)};
  return {std::min(end, companions_->first_needed(group, num_computed)), end};
}

// Fills a group's empty table with the entries that needed_entries() names.
void KVCacheManager::set_entries(Sequence& seq, int32_t group, int64_t num_computed,
                                 std::span<const int32_t> blocks) {
  BlockTable& table = table_of(seq, group);
  const int32_t first = needed_entries(group, num_computed)[0];
  if (group > 0) seq.groups[group - 1].num_behind = first;
  for (int32_t i = 0; i < first; ++i) table.append(-1);
  table.append(blocks);
}

void KVCacheManager::check_no_step(const char* function, const Sequence& seq) const {
  for (int32_t group = 1; group < num_groups(); ++group)
    QUIRE_CHECK_ARG(!companions_->is_state(group) || seq.num_planned == 0, function,
                    ": seq: expected one between commit() and step(), as groups[", group,
                    "] is a state, got one with ", seq.num_planned, " tokens planned");
}

std::optional<KVCacheManager::BlockPairs> KVCacheManager::swap_out(SequenceId id) {
  const std::lock_guard guard(mutex_);
  check_here("swap_out", get(id));
  QUIRE_CHECK_ARG(host_, "swap_out: expected a manager with num_host_blocks > 0");
  settle();
  Sequence& seq = get(id);
  check_no_step("swap_out", seq);
  reserve_more(seq.tokens, static_cast<size_t>(seq.num_trunk_tokens()));
  BlockPairs pairs;
  for (int32_t group = 0; group < num_groups(); ++group)
    for (auto [i, end] = needed_entries(group, seq.num_computed); i < end; ++i)
      pairs.push_back({table_of(seq, group)[i], -1});
  Swapped swapped{seq.num_computed, std::vector<int32_t>(pairs.size())};
  if (static_cast<int64_t>(pairs.size()) > host_->num_available()) return std::nullopt;
  reserve_releases(num_held(seq));
  Swapped& entry = swapped_[static_cast<int32_t>(id.index())];  // nothing throws from here on
  host_->allocate(swapped.slots, [](int32_t victim) { return victim; });
  for (size_t i = 0; i < pairs.size(); ++i) pairs[i][1] = swapped.slots[i];
  give_back(seq);
  seq.num_computed = seq.num_planned = 0;
  seq.away = Away::kSwapped;
  entry = std::move(swapped);
  return pairs;
}

// What the prefix cache has of the blocks that a swapped sequence needs, one group after the other;
// -1: it must be copied. The first group's leading ones are in path_.
std::vector<int32_t> KVCacheManager::find_swapped(const Sequence& seq, int64_t num_computed) const {
  const int64_t num_whole = num_computed / block_size_;
  path_.clear();
  const int64_t num_found =
      cache_ ? cache_->find_path(seq.root, seq.tokens.data(), num_whole * block_size_, &path_) /
                   block_size_
             : 0;
  path_.resize(static_cast<size_t>(num_found));
  std::vector<int32_t> blocks;
  for (int32_t group = 0; group < num_groups(); ++group)
    for (auto [i, end] = needed_entries(group, num_computed); i < end; ++i) {
      const bool is_state = group > 0 && companions_->is_state(group);
      const bool ends_block = num_computed == num_whole * block_size_;
      // A state is that of the block that ends with the last token.
      const int64_t node = !is_state ? i : ends_block ? num_whole - 1 : num_found;
      if (node >= num_found)
        blocks.push_back(-1);
      else
        blocks.push_back(group == 0 ? path_[node]
                                    : std::max(-1, companions_->find(group, path_[node])));
    }
  return blocks;
}

std::optional<KVCacheManager::BlockPairs> KVCacheManager::swap_in(SequenceId id) {
  const std::lock_guard guard(mutex_);
  settle();
  Sequence& seq = get(id);
  QUIRE_CHECK_ARG(seq.away == Away::kSwapped, "swap_in: seq: expected one that is swapped out");
  const Swapped& swapped = swapped_.at(static_cast<int32_t>(id.index()));
  const int64_t num_computed = swapped.num_computed;
  std::vector<int32_t> blocks = find_swapped(seq, num_computed);
  const int32_t num_found = static_cast<int32_t>(path_.size());
  int64_t num_idle = 0, num_missing = 0;
  for (int32_t block : blocks) {
    num_missing += block < 0;
    num_idle += block >= 0 && allocator_.refcount(block) == 0;
  }
  if (num_missing > allocator_.num_available() - num_idle) {
    drop_offloads();
    return std::nullopt;
  }
  BlockPairs pairs;
  pairs.reserve(static_cast<size_t>(num_missing));
  reserve_swapped_in(seq, num_computed, num_found);
  reserve_blocks(num_missing);  // nothing throws from here on
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i] >= 0) allocator_.share(blocks[i]);
    if (static_cast<int32_t>(i) < num_found) on_hit(blocks[i]);
  }
  allocate(num_missing);
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i] >= 0) continue;
    blocks[i] = new_blocks_[pairs.size()];
    pairs.push_back({swapped.slots[i], blocks[i]});
  }
  drop_slots(seq);
  std::span<const int32_t> rest = blocks;
  for (int32_t group = 0; group < num_groups(); ++group) {
    const auto [first, end] = needed_entries(group, num_computed);
    set_entries(seq, group, num_computed, rest.first(end - first));
    rest = rest.subspan(end - first);
  }
  for (int32_t i = num_found; cache_ && i < num_computed / block_size_; ++i) publish(seq, i);
  if (cache_) cache_->drop_reserved();
  if (companions_) publish_companions(seq, num_computed);
  seq.num_computed = num_computed;
  return pairs;
}

// Asks for the memory that a sequence's tables take and what it publishes; num_found blocks are
// cached.
void KVCacheManager::reserve_swapped_in(Sequence& seq, int64_t num_computed, int32_t num_found) {
  const int32_t num_whole = static_cast<int32_t>(num_computed / block_size_);
  seq.table.reserve_more(num_whole + 1);
  for (GroupTable& group : seq.groups) group.table.reserve_more(num_whole + 1);
  if (cache_)
    cache_->reserve_for(seq.tokens_from(int64_t{num_found} * block_size_), num_whole - num_found);
  reserve_releases(int64_t{num_whole} * num_groups());
}

// Caches what a sequence has of the groups beyond the first beside that one's whole blocks.
void KVCacheManager::publish_companions(Sequence& seq, int64_t num_computed) {
  const int32_t num_whole = static_cast<int32_t>(num_computed / block_size_);
  for (int32_t group = 1; cache_ && group < num_groups(); ++group) {
    if (!companions_->is_state(group)) {
      for (int32_t i = needed_entries(group, num_computed)[0]; i < num_whole; ++i)
        publish_companion(seq, group, i, i);
    } else if (num_whole > 0 && num_computed % block_size_ == 0) {
      publish_companion(seq, group, 0, num_whole - 1);
    }
  }
}

// Gives up what is kept in host memory for a sequence; it has to be computed again then.
void KVCacheManager::drop_slots(Sequence& seq) {
  const auto found = swapped_.find(static_cast<int32_t>(&seq - sequences_.data()));
  for (int32_t slot : found->second.slots) host_->release(slot);
  swapped_.erase(found);
  seq.away = Away::kNo;
}

}  // namespace quire
