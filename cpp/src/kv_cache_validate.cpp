// SPDX-License-Identifier: Apache-2.0
// KVCacheManager's statistics, and validate(): recounts every reference from the sequences.
#include <algorithm>
#include <unordered_map>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace quire {

// Used blocks hold block_size tokens each, but for those that no sequence has filled.
int64_t KVCacheManager::count_used_tokens() const {
  struct Holders {
    int32_t num_tokens = 0;  // the most that a sequence among these has computed
    int32_t count = 0;
  };
  std::unordered_map<int32_t, Holders> unfilled;
  for (const Sequence& seq : sequences_) {
    if (seq.serial == 0) continue;
    int32_t num_tokens = static_cast<int32_t>(seq.num_computed % block_size_);
    for (int32_t i = static_cast<int32_t>(seq.num_computed / block_size_); i < seq.table.size();
         ++i, num_tokens = 0) {
      Holders& holders = unfilled[seq.table[i]];
      holders.num_tokens = std::max(holders.num_tokens, num_tokens);
      ++holders.count;
    }
  }
  for (const Deferred& deferred : deferred_) ++unfilled[deferred.block].count;
  int64_t result = int64_t{allocator_.num_used()} * block_size_;
  for (const auto& [block, holders] : unfilled)
    if (allocator_.refcount(block) == holders.count) result -= block_size_ - holders.num_tokens;
  return result;
}

KVCacheStats KVCacheManager::stats() const {
  KVCacheStats stats;
  stats.num_blocks = allocator_.num_blocks();
  stats.block_size = block_size_;
  stats.free_blocks = allocator_.num_free();
  stats.used_blocks = allocator_.num_used();
  stats.cached_blocks = allocator_.num_cached();
  stats.high_water_blocks = allocator_.high_water();
  stats.deferred_refs = num_deferred_refs();
  stats.used_tokens = count_used_tokens();
  stats.waste_tokens = int64_t{stats.used_blocks} * block_size_ - stats.used_tokens;
  stats.prefix_query_tokens = prefix_query_tokens_;
  stats.prefix_hit_tokens = prefix_hit_tokens_;
  stats.evicted_blocks = evicted_blocks_;
  return stats;
}

void KVCacheManager::validate_sequence(const Sequence& seq) const {
  const int64_t planned = seq.num_computed + seq.num_planned;
  QUIRE_INVARIANT(seq.num_planned >= 0 && planned <= seq.num_tokens(), "a sequence of ",
                  seq.num_tokens(), " tokens has ", planned, " planned");
  QUIRE_INVARIANT(seq.table.blocks_for(planned) <= seq.table.size(), "a sequence lacks blocks");
  for (int32_t i = 0; i < seq.table.size(); ++i) {
    const int32_t block = seq.table[i];
    const int64_t held =
        std::clamp<int64_t>(seq.num_computed - int64_t{i} * block_size_, 0, int64_t{block_size_});
    if (!cache_ || held == 0 || (held < block_size_ && !cache_->contains(block))) continue;
    QUIRE_INVARIANT(cache_->parent(block) == (i == 0 ? seq.root : seq.table[i - 1]), "block ",
                    block, ": full, and not cached after the sequence's prefix");
    const std::vector<int32_t> cached = cache_->tokens(block);
    QUIRE_INVARIANT(static_cast<int64_t>(cached.size()) >= held &&
                        std::equal(cached.begin(), cached.begin() + held,
                                   &seq.tokens[int64_t{i} * block_size_]),
                    "block ", block, ": cached with other tokens");
  }
}

void KVCacheManager::validate() const {
  allocator_.validate();
  if (cache_) cache_->validate();
  std::vector<int32_t> refcounts(allocator_.num_blocks(), 0);
  for (const Sequence& seq : sequences_) {
    if (seq.serial == 0) continue;
    validate_sequence(seq);
    for (int32_t block : seq.table.ids()) ++refcounts[block];
  }
  for (const Deferred& deferred : deferred_) ++refcounts[deferred.block];
  for (int32_t block = 0; block < allocator_.num_blocks(); ++block) {
    QUIRE_INVARIANT(refcounts[block] == allocator_.refcount(block), "block ", block, ": ",
                    refcounts[block], " holders, refcount ", allocator_.refcount(block));
    if (!cache_ || refcounts[block] == 0) continue;
    QUIRE_INVARIANT(cache_->contains(block) == allocator_.is_cached(block), "block ", block,
                    ": allocator and prefix cache disagree");
  }
  if (!cache_) return;
  int32_t num_idle = 0;
  for (int32_t block = 0; block < allocator_.num_blocks(); ++block)
    num_idle += refcounts[block] == 0 && cache_->contains(block);
  QUIRE_INVARIANT(num_idle == allocator_.num_cached(), "idle blocks and prefix cache disagree");
  // Whoever holds a block holds its parent, so what depends on an idle block is idle.
  for (int32_t block = 0; block < allocator_.num_blocks(); ++block) {
    const int32_t parent = cache_->parent(block);
    QUIRE_INVARIANT(
        parent < 0 || allocator_.refcount(block) == 0 || allocator_.refcount(parent) > 0, "block ",
        block, ": in use without its prefix");
  }
}

}  // namespace quire
