// SPDX-License-Identifier: Apache-2.0
// Prefixes that the pool does not hold and a store does.
#include <algorithm>
#include <utility>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace quire {

void KVCacheManager::attach_store(const KVStore& store) {
  const std::lock_guard guard(mutex_);
  QUIRE_CHECK_ARG(cache_, "attach_store: expected a manager with prefix caching");
  check_one_group("attach_store");
  for (const KVStore* known : stores_)
    QUIRE_CHECK_ARG(known->tier() != store.tier(),
                    "attach_store: store: expected one store a tier, got a second one");
  stores_.push_back(&store);
  if (!keys_) keys_.emplace(allocator_.num_blocks());
  is_watched_ = true;
}

// Blocks of several layer groups that hold the same tokens would have to come and go together.
void KVCacheManager::check_one_group(const char* function) const {
  QUIRE_CHECK_ARG(!companions_, function, ": expected a manager of one layer group, got ",
                  num_groups());
}

std::vector<KVTransfer> KVCacheManager::take_offloads() {
  const std::lock_guard guard(mutex_);
  return std::exchange(offloads_, {});
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

// What stores hold of a sequence's whole blocks, from one on, as far as it goes without a gap.
std::vector<KVTransfer> KVCacheManager::find_in_stores(const Sequence& seq,
                                                       int32_t first_block) const {
  std::vector<KVTransfer> found;
  const int64_t end = (seq.num_tokens() - 1) / block_size_;
  ChainKey key = keys_->key(*cache_, first_block == 0 ? seq.root : seq.table[first_block - 1]);
  for (int64_t i = first_block; i < end; ++i) {
    const int32_t* tokens = seq.tokens_from(i * block_size_);
    key = chain_key(key, {tokens, static_cast<size_t>(block_size_)});
    const KVStore* store = store_with(key);
    if (!store) break;
    found.push_back({-1, store->tier(), key});
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
  offloads_.clear();
  if (stores_.empty()) return std::vector<KVTransfer>{};
  const int32_t first = static_cast<int32_t>(seq.num_computed / block_size_);
  std::vector<KVTransfer> loads = find_in_stores(seq, first);
  if (loads.empty()) return loads;
  if (!allocate(static_cast<int64_t>(loads.size()))) return std::nullopt;
  // A block of which some leading tokens were equal makes way for the one that holds them all.
  trim(seq, first);
  if (seq.num_cached == seq.num_computed) {
    const int64_t num_dropped = seq.num_computed % block_size_;
    seq.num_cached -= num_dropped;
    prefix_hit_tokens_ -= num_dropped;
  }
  seq.num_computed = int64_t{first} * block_size_;
  for (size_t i = 0; i < loads.size(); ++i) loads[i].block = new_blocks_[i];
  seq.table.append(new_blocks_);
  seq.away = Away::kFetching;
  fetches_[static_cast<int32_t>(id.index())] = loads;
  return loads;
}

void KVCacheManager::fetched(SequenceId id, int32_t num_blocks) {
  const std::lock_guard guard(mutex_);
  settle();
  Sequence& seq = get(id);
  QUIRE_CHECK_ARG(seq.away == Away::kFetching, "fetched: seq: expected one that is being fetched");
  const auto fetch = fetches_.find(static_cast<int32_t>(id.index()));
  const std::vector<KVTransfer>& loads = fetch->second;
  QUIRE_CHECK_ARG(num_blocks >= 0 && num_blocks <= static_cast<int64_t>(loads.size()),
                  "fetched: num_blocks: expected 0 to ", loads.size(), ", got ", num_blocks);
  const bool is_new = seq.num_cached == seq.num_computed;  // nothing was computed by a step yet
  for (int32_t i = 0; i < num_blocks; ++i) {
    publish(seq, static_cast<int32_t>(seq.num_computed / block_size_));
    seq.num_computed += block_size_;
    fetched_tokens_[static_cast<int>(loads[i].tier)] += block_size_;
  }
  if (is_new) seq.num_cached = seq.num_computed;
  fetches_.erase(fetch);
  seq.away = Away::kNo;
  trim(seq, seq.table.blocks_for(seq.num_computed));
}

}  // namespace quire
