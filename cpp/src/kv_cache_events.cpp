// SPDX-License-Identifier: Apache-2.0
// What follows the prefix cache's contents: events and classes of reuse.
#include "quire/block_keys.h"
#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace quire {

ChainKey BlockKeys::key(const PrefixCache& cache, int32_t block) {
  size_t num_unknown = 0;
  int32_t known = block;
  for (; known >= 0 && !is_known_[known]; known = cache.parent(known)) path_[num_unknown++] = known;
  ChainKey key = known < 0 ? root_key(cache.salt(known)) : keys_[known];
  while (num_unknown > 0) {
    const int32_t next = path_[--num_unknown];
    const std::span<int32_t> tokens(tokens_.data(), cache.num_tokens(next));
    cache.copy_tokens(next, tokens.data());
    key = keys_[next] = chain_key(key, tokens);
    is_known_[next] = 1;
  }
  return key;
}

void BlockKeys::admit(const PrefixCache& cache, int32_t block, std::span<const int32_t> tokens) {
  keys_[block] = chain_key(key(cache, cache.parent(block)), tokens);
  is_known_[block] = 1;
}

// ---- Events

void KVCacheManager::push_event(CacheEventKind kind, int32_t block, CacheTier tier) {
  CacheEvent event;
  event.kind = kind;
  event.tier = tier;
  event.block = block;
  event.key = keys_->key(*cache_, block);
  event.parent = keys_->key(*cache_, cache_->parent(block));
  events_->push(event);
}

std::vector<CacheEvent> KVCacheManager::take_events() {
  const std::lock_guard guard(mutex_);
  settle();
  std::vector<CacheEvent> events;
  if (events_) events_->take(events);
  return events;
}

std::vector<int32_t> KVCacheManager::cached_blocks() const {
  const std::lock_guard guard(mutex_);
  std::vector<int32_t> blocks;
  for (int32_t block = 0; cache_ && block < allocator_.num_blocks(); ++block)
    if (cache_->contains(block)) blocks.push_back(block);
  return blocks;
}

// ---- What enters and leaves the prefix cache

void KVCacheManager::watch_stored(int32_t block, std::span<const int32_t> tokens) {
  const int32_t parent = cache_->parent(block);
  if (ReuseClasses* reuse = allocator_.reuse()) {
    const uint64_t parent_id = parent < 0 ? root_id(parent) : reuse->id(parent);
    reuse->admit(block, ReuseClasses::content_id(parent_id, tokens), parent);
  }
  if (!events_) return;
  keys_->admit(*cache_, block, tokens);
  push_event(CacheEventKind::kStored, block);
}

void KVCacheManager::watch_hit(int32_t block) {
  if (ReuseClasses* reuse = allocator_.reuse()) reuse->use(block, cache_->parent(block));
}

void KVCacheManager::watch_evicted(int32_t block) {
  const bool is_offered = !stores_.empty() && cache_->num_tokens(block) == block_size_;
  const CacheTier tier = is_offered ? stores_.front()->tier() : CacheTier::kDevice;
  if (is_offered) {
    const ChainKey key = keys_->key(*cache_, block);
    if (!is_in_all_stores(key)) offloads_.push_back({block, tier, key});
  }
  if (events_)
    push_event(is_offered ? CacheEventKind::kSwapped : CacheEventKind::kEvicted, block, tier);
  if (keys_) keys_->forget(block);
}

// A block has left the prefix cache.
void KVCacheManager::watch_left(int32_t block) {
  for (YieldedMatch* reader = yielded_; reader; reader = reader->next)
    reader->is_lost |= reader->block == block;
  if (timers_) timers_->erase(block);
}

int32_t KVCacheManager::clear_cache() {
  const std::lock_guard guard(mutex_);
  if (!cache_) return 0;
  settle();
  const std::vector<int32_t> order = cache_->parents_first();
  const auto is_used = [&](int32_t block) { return allocator_.refcount(block) > 0; };
  int32_t num_cleared = 0;
  for (size_t i = order.size(); i-- > 0;) {  // children first
    const int32_t node = order[i];
    for (int32_t group = 1; group < num_groups(); ++group) {
      const int32_t companion = companions_->find(group, node);
      if (companion == CompanionCache::kNone || is_used(companion)) continue;
      companions_->erase(companion);
      on_left(companion);
      allocator_.forget(companion);
      ++num_cleared;
    }
    if (is_used(node)) continue;
    if (events_) push_event(CacheEventKind::kRemoved, node);
    if (keys_) keys_->forget(node);
    cache_->erase(node);
    on_left(node);
    allocator_.forget(node);
    ++num_cleared;
  }
  return num_cleared;
}

// A block of a group but the first. Events tell of the tree alone; stores keep it, too.
void KVCacheManager::watch_companion_evicted(int32_t block) {
  if (stores_.empty()) return;
  const ChainKey key =
      group_key(keys_->key(*cache_, companions_->node_of(block)), companions_->group_of(block));
  if (!is_in_all_stores(key)) offloads_.push_back({block, stores_.front()->tier(), key});
}

uint64_t KVCacheManager::root_id(int32_t root) const {
  const Salt salt = cache_->salt(root);
  return salt ? std::hash<std::string_view>()(*salt) : 0;
}

}  // namespace quire
