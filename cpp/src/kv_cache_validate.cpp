// SPDX-License-Identifier: Apache-2.0
// KVCacheManager's statistics, and validate(): recounts every reference from the sequences.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace quire {
namespace {

constexpr size_t kSeenAtOnce = 16;  // sequences or blocks, before stats() gives way

}  // namespace

// A sequence or a few references at a time, so that steps can go on in between.
void KVCacheManager::collect_held(PatientLock& lock, std::vector<Held>* held) const {
  for (size_t at = 0; at < sequences_.size(); ++at) {
    if (at % kSeenAtOnce == 0) lock.give_way_if_wanted();
    if (at >= sequences_.size() || sequences_[at].id == SequenceId{}) continue;
    const Sequence& seq = sequences_[at];
    const int64_t computed = num_computed(seq);
    if (seq.row >= 0) {  // its table lags behind
      const int32_t num_tokens = static_cast<int32_t>(computed % block_size_);
      const auto block = static_cast<int32_t>(batch_.slot_mapping()[seq.row] / block_size_);
      if (num_tokens > 0 || loop_stepped_) held->push_back({block, num_tokens, true});
      continue;
    }
    for (int32_t group = 0; group < num_groups(); ++group) {
      if (group > 0 && companions_->is_state(group)) continue;
      const BlockTable& table = group == 0 ? seq.table : seq.groups[group - 1].table;
      int32_t num_tokens = static_cast<int32_t>(computed % block_size_);
      for (int32_t i = static_cast<int32_t>(computed / block_size_); i < table.size(); ++i)
        held->push_back({table[i], std::exchange(num_tokens, 0), true});
    }
  }
  for (const auto& [index, fetch] : fetches_)  // what has been asked for only now
    for (const std::vector<int32_t>& blocks : fetch.blocks)
      for (int32_t block : blocks)
        if (block >= 0 && !allocator_.is_cached(block)) held->push_back({block, 0, true});
  for (size_t at = 0; at < deferred_.size(); ++at) {
    if (at % kSeenAtOnce == 0) lock.give_way_if_wanted();
    if (at < deferred_.size()) held->push_back({deferred_[at].block, 0, false});
  }
}

// What only a walk over the sequences tells. Used blocks hold block_size tokens each, but for those
// that no sequence has filled.
void KVCacheManager::count_used(PatientLock& lock, KVCacheStats* stats) const {
  std::vector<Held> held;
  collect_held(lock, &held);
  mutex_.unlock();
  std::sort(held.begin(), held.end(), [](Held a, Held b) { return a.block < b.block; });
  mutex_.lock_patiently();
  const int64_t room = int64_t{stats->used_blocks} * block_size_;
  stats->used_tokens = room;
  stats->fenced_blocks = 0;
  for (size_t i = 0, num_seen = 0; i < held.size(); ++num_seen) {
    if (num_seen % kSeenAtOnce == 0) lock.give_way_if_wanted();
    const int32_t block = held[i].block;
    int32_t num_tokens = 0;  // the most that a sequence among the holders has computed
    int32_t num_sequences = 0, num_holders = 0;
    for (; i < held.size() && held[i].block == block; ++i, ++num_holders) {
      num_tokens = std::max(num_tokens, held[i].num_tokens);
      num_sequences += held[i].by_sequence;
    }
    if (allocator_.refcount(block) > num_holders) continue;
    stats->used_tokens -= block_size_ - num_tokens;
    stats->fenced_blocks += num_sequences == 0;
  }
  stats->used_tokens = std::max<int64_t>(stats->used_tokens, 0);
  stats->waste_tokens = room - stats->used_tokens;
}

int64_t KVCacheManager::num_bytes() const {
  return allocator_.num_bytes() + (cache_ ? cache_->num_bytes() : 0) +
         (companions_ ? companions_->num_bytes() : 0) + (keys_ ? keys_->num_bytes() : 0) +
         (timers_ ? timers_->num_bytes() : 0);
}

KVCacheStats KVCacheManager::stats() const {
  PatientLock lock(mutex_);
  KVCacheStats stats;
  stats.num_blocks = allocator_.num_blocks();
  stats.block_size = block_size_;
  stats.free_blocks = allocator_.num_free();
  stats.used_blocks = allocator_.num_used();
  stats.cached_blocks = allocator_.num_cached();
  stats.high_water_blocks = allocator_.high_water();
  stats.deferred_refs = num_deferred_refs();
  stats.prefix_query_tokens = prefix_query_tokens_;
  stats.prefix_hit_tokens = prefix_hit_tokens_;
  stats.evicted_blocks = evicted_blocks_;
  stats.pinned_blocks = static_cast<int32_t>(pins_.size());
  stats.lost_events = events_ ? events_->num_lost() : 0;
  stats.host_hit_tokens = fetched_tokens_[static_cast<int>(CacheTier::kHost)];
  stats.file_hit_tokens = fetched_tokens_[static_cast<int>(CacheTier::kFile)];
  stats.num_host_blocks = host_ ? host_->num_blocks() : 0;
  stats.swapped_blocks = host_ ? host_->num_used() : 0;
  count_used(lock, &stats);
  return stats;
}

void KVCacheManager::validate_sequence(const Sequence& seq) const {
  const int64_t planned = seq.num_computed + seq.num_planned;
  QUIRE_INVARIANT(seq.num_planned >= 0 && planned <= seq.num_tokens(), "a sequence of ",
                  seq.num_tokens(), " tokens has ", planned, " planned");
  QUIRE_INVARIANT(seq.table.blocks_for(planned) <= seq.table.size(), "a sequence lacks blocks");
  const std::vector<int32_t> known = tokens(seq.id);
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
                                   known.begin() + int64_t{i} * block_size_),
                    "block ", block, ": cached with other tokens");
  }
}

// The references that sequences, trunks, pins and steps in flight should hold on each block.
std::vector<int32_t> KVCacheManager::count_references() const {
  std::vector<int32_t> refcounts(allocator_.num_blocks(), 0);
  std::unordered_map<const Trunk*, int32_t> trunks;
  for (const Sequence& seq : sequences_) {
    if (seq.id == SequenceId{}) continue;
    for (int32_t i = seq.table.num_shared(); i < seq.table.size(); ++i) ++refcounts[seq.table[i]];
    if (seq.trunk) ++trunks[seq.trunk];
    for (const GroupTable& group : seq.groups)
      for (int32_t i = group.num_behind; i < group.table.size(); ++i) ++refcounts[group.table[i]];
  }
  for (const auto& [trunk, num_holders] : trunks) {
    QUIRE_INVARIANT(trunk->num_holders == num_holders, "a trunk of ", num_holders,
                    " sequences counts ", trunk->num_holders);
    for (int32_t block : trunk->blocks) ++refcounts[block];
  }
  for (const auto& [index, fetch] : fetches_)
    for (const std::vector<int32_t>& blocks : fetch.blocks)
      for (int32_t block : blocks)
        if (block >= 0) ++refcounts[block];
  for (const Deferred& deferred : deferred_) ++refcounts[deferred.block];
  for (const auto& [block, count] : pins_) ++refcounts[block];
  return refcounts;
}

// Sequences that are away have what is kept for them, and nobody else has.
void KVCacheManager::validate_away() const {
  size_t num_fetching = 0, num_swapped = 0, num_slots = 0;
  for (const Sequence& seq : sequences_) {
    num_fetching += seq.away == Away::kFetching;
    if (seq.away != Away::kSwapped) continue;
    ++num_swapped;
    const Swapped& swapped = swapped_.at(static_cast<int32_t>(&seq - sequences_.data()));
    QUIRE_INVARIANT(
        seq.table.size() == 0 && seq.num_computed == 0 && swapped.num_computed <= seq.num_tokens(),
        "a sequence is in the pool and swapped out");
    size_t num_needed = 0;
    for (int32_t group = 0; group < num_groups(); ++group) {
      const auto [first, end] = needed_entries(group, swapped.num_computed);
      num_needed += end - first;
    }
    QUIRE_INVARIANT(swapped.slots.size() == num_needed, "a swapped sequence lacks host blocks");
    for (int32_t slot : swapped.slots)
      QUIRE_INVARIANT(host_->refcount(slot) == 1, "host block ", slot, ": not the sequence's own");
    num_slots += swapped.slots.size();
  }
  QUIRE_INVARIANT(num_fetching == fetches_.size() && num_swapped == swapped_.size(),
                  "something is kept for a sequence that is not away");
  if (!host_) return;
  host_->validate();
  QUIRE_INVARIANT(num_slots == static_cast<size_t>(host_->num_used()), "a host block leaked");
}

void KVCacheManager::validate() const {
  const std::lock_guard guard(mutex_);
  settle();
  allocator_.validate();
  validate_away();
  if (timers_) timers_->validate();
  if (cache_) cache_->validate();
  for (const Sequence& seq : sequences_)
    if (seq.id != SequenceId{}) {
      validate_sequence(seq);
      if (companions_) validate_groups(seq);
    }
  const auto is_cached = [&](int32_t block) {
    return cache_->contains(block) || (companions_ && companions_->contains(block));
  };
  const std::vector<int32_t> refcounts = count_references();
  for (int32_t block = 0; block < allocator_.num_blocks(); ++block) {
    QUIRE_INVARIANT(refcounts[block] == allocator_.refcount(block), "block ", block, ": ",
                    refcounts[block], " holders, refcount ", allocator_.refcount(block));
    if (!cache_ || refcounts[block] == 0) continue;
    QUIRE_INVARIANT(is_cached(block) == allocator_.is_cached(block), "block ", block,
                    ": allocator and prefix cache disagree");
  }
  if (companions_) validate_companions();
  if (!cache_) return;
  int32_t num_idle = 0;
  for (int32_t block = 0; block < allocator_.num_blocks(); ++block)
    num_idle += refcounts[block] == 0 && is_cached(block);
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
