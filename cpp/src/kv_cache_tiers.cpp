// SPDX-License-Identifier: Apache-2.0
// Prefixes that the pool does not hold and a store does.
#include <algorithm>
#include <iterator>
#include <utility>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"
#include "reserve_more.h"

namespace quire {

void KVCacheManager::attach_store(const KVStore& store) {
  const std::lock_guard guard(mutex_);
  QUIRE_CHECK_ARG(cache_, "attach_store: expected a manager with prefix caching");
  for (const KVStore* known : stores_)
    QUIRE_CHECK_ARG(known->tier() != store.tier(),
                    "attach_store: store: expected one store a tier, got a second one");
  reserve_more(stores_, 1);
  if (!keys_) keys_.emplace(allocator_.num_blocks(), block_size_);
  stores_.push_back(&store);
  is_watched_ = true;
}

std::vector<KVTransfer> KVCacheManager::take_offloads() {
  const std::lock_guard guard(mutex_);
  if (earlier_offloads_.empty()) return std::exchange(offloads_, {});  // takes no memory
  std::vector<KVTransfer> offloads = earlier_offloads_;
  offloads.insert(offloads.end(), offloads_.begin(), offloads_.end());
  drop_offloads();
  return offloads;
}

size_t KVCacheManager::num_offloads() const {
  const std::lock_guard guard(mutex_);
  return earlier_offloads_.size() + offloads_.size();
}

// Evicted since the step before the latest, and not by the latest itself.
void KVCacheManager::offer_also(std::vector<KVTransfer> offloads) {
  const std::lock_guard guard(mutex_);
  earlier_offloads_ = std::move(offloads);
}

void KVCacheManager::drop_offloads() {
  offloads_.clear();
  earlier_offloads_.clear();
}

bool KVCacheManager::is_in_all_stores(const ChainKey& key) const {
  return std::all_of(stores_.begin(), stores_.end(),
                     [&](const KVStore* store) { return store->contains(key); });
}

const KVStore* KVCacheManager::store_with(const ChainKey& key) const {
  const auto found = std::find_if(stores_.begin(), stores_.end(),
                                  [&](const KVStore* store) { return store->contains(key); });
  return found == stores_.end() ? nullptr : *found;
}

void KVCacheManager::check_here(const char* function, const Sequence& seq) const {
  QUIRE_CHECK_ARG(seq.away != Away::kFetching, function,
                  ": seq: expected no fetch under way; call fetched() first");
  QUIRE_CHECK_ARG(seq.away != Away::kSwapped, function,
                  ": seq: expected one in the pool, got one that is swapped out");
}

// ---- Fetching

// Whole blocks that a sequence can go on behind, once it has what `fetch` holds: as many as every
// group has what it needs for, and no fewer than it has.
int32_t KVCacheManager::reach_of(const Sequence& seq, const Fetch& fetch) const {
  std::vector<int32_t> runs(num_groups());  // entries at hand, up to the current one
  for (int32_t group = 1; group < num_groups(); ++group)
    if (!companions_->is_state(group))
      runs[group] = std::max(0, fetch.first - seq.groups[group - 1].num_behind);
  int32_t reach = fetch.first;
  for (int32_t i = 0; i < fetch.end - fetch.first && fetch.blocks[0][i] >= 0; ++i) {
    const int32_t end = fetch.first + i + 1;
    bool suffices = true;
    for (int32_t group = 1; group < num_groups(); ++group) {
      runs[group] = fetch.blocks[group][i] < 0 ? 0 : runs[group] + 1;
      suffices &= end - runs[group] <= companions_->first_needed(group, int64_t{end} * block_size_);
    }
    if (suffices) reach = end;
  }
  return reach;
}

// What the pool and the stores together hold of a sequence behind its whole blocks, as far as it
// can go on with it. It takes no references: what is to be loaded has no block yet.
KVCacheManager::Fetch KVCacheManager::find_in_stores(const Sequence& seq) {
  constexpr int32_t kToLoad = INT32_MAX;
  Fetch found;
  found.first = static_cast<int32_t>(seq.num_computed / block_size_);
  const int32_t last = static_cast<int32_t>((seq.num_tokens() - 1) / block_size_);
  const int32_t root = found.first == 0 ? seq.root : seq.table[found.first - 1];
  const int32_t* tokens = seq.tokens_from(int64_t{found.first} * block_size_);
  path_.resize(static_cast<size_t>(
      cache_->find_path(root, tokens, int64_t{last - found.first} * block_size_, &path_) /
      block_size_));
  std::vector<std::vector<KVTransfer>> loads(num_groups());
  found.blocks.resize(num_groups());
  ChainKey key = keys_->key(*cache_, root);
  for (found.end = found.first; found.end < last; ++found.end, tokens += block_size_) {
    const size_t at = static_cast<size_t>(found.end - found.first);
    const int32_t node = at < path_.size() ? path_[at] : -1;
    key = chain_key(key, {tokens, static_cast<size_t>(block_size_)});
    for (int32_t group = 0; group < num_groups(); ++group) {
      const ChainKey own = group == 0 ? key : group_key(key, group);
      int32_t block = group == 0 ? node : node >= 0 ? companions_->find(group, node) : -1;
      const KVStore* store = block < 0 ? store_with(own) : nullptr;
      if (store) block = kToLoad;
      loads[group].push_back({-1, store ? store->tier() : CacheTier::kDevice, own});
      found.blocks[group].push_back(std::max(-1, block));
    }
    if (found.blocks[0].back() < 0) break;
  }
  found.end = reach_of(seq, found);
  for (int32_t group = 0; group < num_groups(); ++group)
    found.blocks[group].resize(found.end - found.first);
  const int64_t num_tokens = int64_t{found.end} * block_size_;
  for (int32_t i = found.first; i < found.end; ++i)
    for (int32_t group = 0; group < num_groups(); ++group) {
      int32_t& block = found.blocks[group][i - found.first];
      if (group > 0 && i < companions_->first_needed(group, num_tokens)) block = -1;
      if (block != kToLoad) continue;
      found.loads.push_back(loads[group][i - found.first]);
      found.places.push_back({group, i});
    }
  return found;
}

std::optional<std::vector<KVTransfer>> KVCacheManager::fetch(SequenceId id) {
  const std::lock_guard guard(mutex_);
  check_here("fetch", get(id));
  settle();
  Sequence& seq = get(id);
  QUIRE_CHECK_ARG(seq.num_planned == 0, "fetch: seq: expected one without a step under way, got ",
                  seq.num_planned, " planned tokens");
  Fetch fetch;
  if (!stores_.empty()) fetch = find_in_stores(seq);
  const int64_t num_loads = static_cast<int64_t>(fetch.loads.size());
  if (num_loads == 0) {
    drop_offloads();
    return std::vector<KVTransfer>{};
  }
  for (const auto& [group, i] : fetch.places) fetch.blocks[group][i - fetch.first] = -1;
  std::vector<int32_t> pooled;
  for (const std::vector<int32_t>& blocks : fetch.blocks)
    std::copy_if(blocks.begin(), blocks.end(), std::back_inserter(pooled),
                 [](int32_t block) { return block >= 0; });
  const auto num_idle = std::count_if(
      pooled.begin(), pooled.end(), [&](int32_t block) { return allocator_.refcount(block) == 0; });
  if (num_loads > allocator_.num_available() - num_idle) {
    drop_offloads();
    return std::nullopt;
  }
  std::vector<KVTransfer> loads = fetch.loads;
  reserve_blocks(num_loads);
  Fetch& entry = fetches_[static_cast<int32_t>(id.index())];  // nothing throws from here on
  for (int32_t block : pooled) allocator_.share(block);
  allocate(num_loads);
  for (size_t i = 0; i < loads.size(); ++i) {
    const auto [group, at] = fetch.places[i];
    fetch.blocks[group][at - fetch.first] = new_blocks_[i];
    fetch.loads[i].block = loads[i].block = new_blocks_[i];
  }
  seq.away = Away::kFetching;
  entry = std::move(fetch);
  return loads;
}

void KVCacheManager::fetched(SequenceId id, int32_t num_blocks) {
  const std::lock_guard guard(mutex_);
  settle();
  Sequence& seq = get(id);
  QUIRE_CHECK_ARG(seq.away == Away::kFetching, "fetched: seq: expected one that is being fetched");
  const auto entry = fetches_.find(static_cast<int32_t>(id.index()));
  const auto num_loads = static_cast<int64_t>(entry->second.loads.size());
  QUIRE_CHECK_ARG(num_blocks >= 0 && num_blocks <= num_loads, "fetched: num_blocks: expected 0 to ",
                  num_loads, ", got ", num_blocks);
  Fetch fetch = entry->second;  // a copy: it stays until there is memory for all
  std::vector<int32_t> lost;
  for (int64_t i = num_loads; i-- > num_blocks;) {
    const auto [group, at] = fetch.places[i];
    lost.push_back(std::exchange(fetch.blocks[group][at - fetch.first], -1));
  }
  const int32_t end = reach_of(seq, fetch);
  reserve_fetched(seq, fetch, end);
  fetches_.erase(entry);
  seq.away = Away::kNo;
  for (int32_t block : lost) release(block);
  if (end > fetch.first) take_fetched(seq, fetch, end, static_cast<size_t>(num_blocks));
  for (const std::vector<int32_t>& blocks : fetch.blocks)  // what is of no use to it now
    for (size_t i = blocks.size(); i-- > 0;)
      if (blocks[i] >= 0) release(blocks[i]);
}

// Asks for the memory that fetched() takes from here on.
void KVCacheManager::reserve_fetched(Sequence& seq, const Fetch& fetch, int32_t end) {
  const int32_t num_blocks = end - fetch.first;
  seq.table.reserve_more(num_blocks);
  for (GroupTable& group : seq.groups) group.table.reserve_more(std::max(1, num_blocks));
  cache_->reserve_for(seq.tokens_from(int64_t{fetch.first} * block_size_), num_blocks);
  const int64_t num_fetched = int64_t{fetch.end - fetch.first} * num_groups();
  reserve_releases(num_held(seq) + 2 * num_fetched);
}

// The sequence goes on behind `end` whole blocks. What it takes of `fetch` is taken out of it.
void KVCacheManager::take_fetched(Sequence& seq, Fetch& fetch, int32_t end, size_t num_came) {
  const int64_t num_computed = int64_t{end} * block_size_;
  // A block of which some leading tokens were equal makes way for the one that holds them all.
  trim(seq, fetch.first);
  if (companions_) trim_groups(seq, fetch.first);
  const auto take = [&](int32_t group, int32_t i) {
    return std::exchange(fetch.blocks[group][i - fetch.first], -1);
  };
  for (int32_t i = fetch.first; i < end; ++i) seq.table.append(take(0, i));
  for (int32_t group = 1; group < num_groups(); ++group) {
    auto& [table, num_behind] = seq.groups[group - 1];
    if (companions_->is_state(group)) {
      if (table.size() > 0) release(table[0]);
      table.truncate(0);
      table.append(take(group, end - 1));
      continue;
    }
    for (int32_t i = fetch.first; i < end; ++i)
      table.append(i < companions_->first_needed(group, num_computed) ? -1 : take(group, i));
    give_back_behind(seq, group, num_computed);
  }
  for (size_t i = 0; i < num_came; ++i) {
    const auto [group, at] = fetch.places[i];
    if (at >= end) continue;
    if (group == 0) publish(seq, at);
    const bool is_last = i + 1 == num_came || fetch.places[i + 1][1] != at;  // of this entry
    if (is_last) fetched_tokens_[static_cast<int>(fetch.loads[i].tier)] += block_size_;
  }
  cache_->drop_reserved();
  if (companions_) publish_companions(seq, num_computed);
  if (seq.num_cached == seq.num_computed) {  // nothing was computed by a step yet
    prefix_hit_tokens_ -= seq.num_computed % block_size_;
    seq.num_cached = num_computed;
  }
  seq.num_computed = num_computed;
}

}  // namespace quire
