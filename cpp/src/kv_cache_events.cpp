// SPDX-License-Identifier: Apache-2.0
// What follows the prefix cache's contents: events and classes of reuse.
#include "quire/block_keys.h"
#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace quire {

ChainKey BlockKeys::key(const PrefixCache& cache, int32_t block) {
  path_.clear();
  int32_t known = block;
  for (; known >= 0 && !is_known_[known]; known = cache.parent(known)) path_.push_back(known);
  ChainKey key = known < 0 ? root_key(cache.salt(known)) : keys_[known];
  for (; !path_.empty(); path_.pop_back()) {
    const int32_t next = path_.back();
    key = keys_[next] = chain_key(key, cache.tokens(next));
    is_known_[next] = 1;
  }
  return key;
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

void KVCacheManager::watch_stored(int32_t block) {
  const int32_t parent = cache_->parent(block);
  if (ReuseClasses* reuse = allocator_.reuse()) {
    const uint64_t parent_id = parent < 0 ? root_id(parent) : reuse->id(parent);
    reuse->admit(block, ReuseClasses::content_id(parent_id, cache_->tokens(block)), parent);
  }
  if (events_) push_event(CacheEventKind::kStored, block);
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

uint64_t KVCacheManager::root_id(int32_t root) const {
  const Salt salt = cache_->salt(root);
  return salt ? std::hash<std::string_view>()(*salt) : 0;
}

}  // namespace quire
