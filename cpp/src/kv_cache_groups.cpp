// SPDX-License-Identifier: Apache-2.0
// What KVCacheManager does for layer groups beyond the first: tables that follow the first
// group's, companions in the prefix cache, and blocks that go back when nobody reads them any more.
#include <algorithm>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace quire {

// ---- How many blocks

// New blocks for tokens before `end`, at most max_step of them a step; copies apart.
int64_t KVCacheManager::missing_in_groups(const Sequence& seq, int64_t end,
                                          int64_t max_step) const {
  int64_t missing = 0;
  for (int32_t group = 1; group < num_groups(); ++group) {
    const auto& [table, num_behind] = seq.groups[group - 1];
    const int64_t most = companions_->most_blocks(group, end, max_step);
    const int64_t all = companions_->is_state(group) ? most : table.blocks_for(end);
    const int64_t held = table.size() - num_behind;
    missing += std::max<int64_t>(0, std::min(all - table.size(), most - held));
  }
  return missing;
}

int64_t KVCacheManager::num_blocks_for(int64_t num_tokens, int64_t max_step) const {
  int64_t count = (num_tokens + block_size_ - 1) / block_size_;
  for (int32_t group = 1; group < num_groups(); ++group)
    count += companions_->most_blocks(group, num_tokens, max_step);
  return count;
}

bool KVCacheManager::caches_states() const {
  for (int32_t group = 1; cache_ && group < num_groups(); ++group)
    if (companions_->is_state(group)) return true;
  return false;
}

// ---- Steps

// What a group's batch has to hold of a step's.
StepBatch::Size KVCacheManager::size_of(int32_t group, const StepBatch::Size& size) const {
  StepBatch::Size own = size;
  if (companions_->is_state(group)) {
    own.max_blocks = std::min(1, size.max_blocks);
    own.num_entries = own.batch_size;
    own.has_slots = false;
  }
  return own;
}

// Blocks up to token `reach`, taken from `fresh`, and the rows of the step. Returns the rest.
std::span<const int32_t> KVCacheManager::extend_groups(Sequence& seq, int64_t end, int64_t reach,
                                                       std::span<const int32_t> fresh) {
  for (int32_t group = 1; group < num_groups(); ++group) {
    BlockTable& table = seq.groups[group - 1].table;
    const int32_t num_blocks = companions_->is_state(group) ? reach > 0 : table.blocks_for(reach);
    const int32_t num_missing = std::max(0, num_blocks - table.size());
    table.append(fresh.first(num_missing));
    fresh = fresh.subspan(num_missing);
    group_batches_[group - 1].add_row(seq.id.value, table, seq.num_computed, end, reach);
  }
  return fresh;
}

// ---- Commit

// The tokens before `end` are about to count as computed; the first group has been published.
void KVCacheManager::advance_groups(Sequence& seq, int64_t end) {
  const int32_t first_block = static_cast<int32_t>(seq.num_computed / block_size_);
  const int32_t end_block = static_cast<int32_t>(end / block_size_);
  for (int32_t group = 1; group < num_groups(); ++group) {
    if (companions_->is_state(group)) {
      // The state of the tokens up to the end of a block, which a prefix hit can begin with.
      if (cache_ && end % block_size_ == 0) publish_companion(seq, group, 0, end_block - 1);
      continue;
    }
    for (int32_t i = first_block; cache_ && i < end_block; ++i) publish_companion(seq, group, i, i);
    give_back_behind(seq, group, end);
  }
}

// Caches a block of a group beside the first group's block `index`, or swaps it for the one there.
void KVCacheManager::publish_companion(Sequence& seq, int32_t group, int32_t entry, int32_t index) {
  BlockTable& table = table_of(seq, group);
  const int32_t node = seq.table[index], block = table[entry];
  const int32_t cached = companions_->find(group, node);
  if (cached == CompanionCache::kNone) {
    companions_->insert(group, node, block);
    allocator_.mark_cached(block);
  } else if (cached != block) {
    allocator_.share(cached);
    table.replace(entry, cached);
    release(block);
  }
}

// Gives back the blocks that the group does not read once so many tokens are computed.
void KVCacheManager::give_back_behind(Sequence& seq, int32_t group, int64_t num_computed) {
  auto& [table, num_behind] = seq.groups[group - 1];
  const int32_t first = companions_->first_needed(group, num_computed);
  for (; num_behind < first; ++num_behind) {
    const int32_t block = table[num_behind];
    if (block < 0) continue;  // a fetch that did not need it
    retain(seq.retention, block);
    release(block);
    table.replace(num_behind, -1);
  }
}

// ---- Beginning, sharing, shrinking

// The companions that a sequence needs behind the cached blocks that it begins with.
void KVCacheManager::attach_groups(Sequence& seq) {
  const int32_t end = seq.table.size();
  for (int32_t group = 1; group < num_groups(); ++group) {
    auto& [table, num_behind] = seq.groups[group - 1];
    const int32_t first = std::min(end, companions_->first_needed(group, seq.num_computed));
    if (!companions_->is_state(group)) {
      num_behind = first;
      for (int32_t i = 0; i < first; ++i) table.append(-1);
    }
    for (int32_t i = first; i < end; ++i) {
      const int32_t block = companions_->find(group, seq.table[i]);
      allocator_.share(block);
      table.append(block);
    }
  }
}

void KVCacheManager::share_groups(const Sequence& parent, Sequence& child) {
  for (int32_t group = 1; group < num_groups(); ++group) {
    const GroupTable& from = parent.groups[group - 1];
    GroupTable& to = child.groups[group - 1];
    to.num_behind = from.num_behind;
    const int32_t num_blocks = companions_->is_state(group)
                                   ? parent.num_computed > 0
                                   : from.table.blocks_for(parent.num_computed);
    for (int32_t i = 0; i < num_blocks; ++i) {
      if (from.table[i] >= 0) allocator_.share(from.table[i]);
      to.table.append(from.table[i]);
    }
  }
}

// Whether every group still has what it takes to go on behind the first num_tokens tokens.
bool KVCacheManager::groups_reach(const Sequence& seq, int64_t num_tokens) const {
  for (int32_t group = 1; group < num_groups(); ++group) {
    if (companions_->is_state(group)) {
      if (num_tokens < seq.num_computed + seq.num_planned) return false;
    } else if (companions_->first_needed(group, std::min(num_tokens, seq.num_computed)) <
               seq.groups[group - 1].num_behind) {
      return false;
    }
  }
  return true;
}

void KVCacheManager::trim_groups(Sequence& seq, int32_t num_blocks) {
  for (int32_t group = 1; group < num_groups(); ++group) {
    auto& [table, num_behind] = seq.groups[group - 1];
    const int32_t kept = companions_->is_state(group) ? std::min(1, num_blocks) : num_blocks;
    for (int32_t i = table.size(); i-- > std::max(kept, num_behind);) {
      retain(seq.retention, table[i]);
      release(table[i]);
    }
    if (kept < table.size()) table.truncate(kept);
    num_behind = std::min(num_behind, kept);
  }
}

// Adds to whole blocks in path_ what the other groups need behind them.
void KVCacheManager::add_companions_to_path() {
  const int32_t end = static_cast<int32_t>(path_.size());
  for (int32_t group = 1; group < num_groups(); ++group)
    for (int32_t i = companions_->first_needed(group, int64_t{end} * block_size_); i < end; ++i)
      path_.push_back(companions_->find(group, path_[i]));
}

// ---- Looking

std::vector<int32_t> KVCacheManager::block_table(SequenceId id, int32_t group) const {
  const std::lock_guard guard(mutex_);
  settle();
  const Sequence& seq = get(id);
  QUIRE_CHECK_ARG(group >= 0 && group < num_groups(), "block_table: group: expected 0 to ",
                  num_groups() - 1, ", got ", group);
  return group == 0 ? seq.table.ids() : seq.groups[group - 1].table.ids();
}

std::vector<LayerGroupStats> KVCacheManager::group_stats() const {
  const std::lock_guard guard(mutex_);
  settle();
  std::vector<LayerGroupStats> stats(num_groups());
  std::vector<bool> seen(allocator_.num_blocks());
  for (const Sequence& seq : sequences_) {
    for (int32_t group = 0; seq.id != SequenceId{} && group < num_groups(); ++group) {
      const BlockTable& table = group == 0 ? seq.table : seq.groups[group - 1].table;
      for (int32_t i = 0; i < table.size(); ++i) {
        if (table[i] < 0 || seen[table[i]]) continue;
        seen[table[i]] = true;
        ++stats[group].used_blocks;
      }
    }
  }
  for (int32_t block = 0; cache_ && block < allocator_.num_blocks(); ++block) {
    if (allocator_.refcount(block) > 0) continue;
    if (cache_->contains(block)) ++stats[0].cached_blocks;
    if (companions_ && companions_->contains(block))
      ++stats[companions_->group_of(block)].cached_blocks;
  }
  return stats;
}

void KVCacheManager::validate_groups(const Sequence& seq) const {
  QUIRE_INVARIANT(static_cast<int32_t>(seq.groups.size()) == num_groups() - 1,
                  "a sequence lacks the table of a group");
  for (int32_t group = 1; group < num_groups(); ++group) {
    const auto& [table, num_behind] = seq.groups[group - 1];
    if (companions_->is_state(group)) {
      QUIRE_INVARIANT(table.size() == (seq.table.size() > 0), "a sequence of ", seq.table.size(),
                      " blocks has ", table.size(), " states");
      continue;
    }
    QUIRE_INVARIANT(table.size() == seq.table.size(), "the tables of groups differ in length");
    QUIRE_INVARIANT(
        num_behind == std::min(table.size(), companions_->first_needed(group, seq.num_computed)),
        "a group has given back ", num_behind, " blocks");
    for (int32_t i = 0; i < table.size(); ++i) {
      QUIRE_INVARIANT((table[i] < 0) == (i < num_behind), "a group lacks a block that it reads");
      if (!cache_ || i < num_behind || i >= seq.num_computed / block_size_) continue;
      QUIRE_INVARIANT(companions_->find(group, seq.table[i]) == table[i], "block ", table[i],
                      ": full, and not cached beside the first group's");
    }
  }
}

void KVCacheManager::validate_companions() const {
  companions_->validate();
  for (int32_t block = 0; block < allocator_.num_blocks(); ++block) {
    if (!companions_->contains(block)) continue;
    const int32_t node = companions_->node_of(block);
    QUIRE_INVARIANT(cache_ && cache_->contains(node) && !cache_->contains(block), "block ", block,
                    ": the companion of a block that is not cached");
    QUIRE_INVARIANT(allocator_.refcount(block) == 0 || allocator_.refcount(node) > 0, "block ",
                    block, ": in use without the first group's");
  }
}

}  // namespace quire
