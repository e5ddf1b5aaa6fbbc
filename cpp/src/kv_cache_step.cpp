// SPDX-License-Identifier: Apache-2.0
// step() and commit() of any batch.
#include <algorithm>
#include <new>
#include <utility>

#include "packed_tokens.h"
#include "quire/error.h"
#include "quire/kv_cache_manager.h"
#include "reserve_more.h"

namespace quire {
namespace {

bool all_ones(std::span<const int32_t> counts) {
  int32_t others = 0;  // no early exit: the loop is vectorised
  for (int32_t count : counts) others |= count ^ 1;
  return others == 0;
}

}  // namespace

// ---- Steps

bool KVCacheManager::may_step() const {
  const std::lock_guard guard(mutex_);
  return async_depth_ == 0 || last_ticket_ - last_retired_ < async_depth_;
}

// Checks each count against its sequence in visited_ and adds up what the step needs.
KVCacheManager::StepNeed KVCacheManager::check_step(std::span<const int32_t> num_new_tokens,
                                                    int32_t lookahead) {
  QUIRE_CHECK_ARG(num_new_tokens.size() == visited_.size(),
                  "step: num_new_tokens: expected one count a sequence, ", visited_.size(),
                  ", got ", num_new_tokens.size());
  QUIRE_CHECK_ARG(lookahead >= 0, "step: lookahead: expected 0 or more, got ", lookahead);
  QUIRE_CHECK_ARG(may_step(), "step: expected at most async_depth=", async_depth_,
                  " steps at a time; retire() the oldest first");
  StepNeed need;
  need.size.batch_size = static_cast<int32_t>(visited_.size());
  for (size_t i = 0; i < visited_.size(); ++i) {
    const Sequence& seq = *visited_[i];
    if (seq.away != Away::kNo) check_here("step", seq);
    const int32_t count = num_new_tokens[i];
    const int64_t known = seq.num_tokens() - seq.num_computed;
    QUIRE_CHECK_ARG(count >= 0 && count <= known, "step: num_new_tokens[", i, "]: expected 0 to ",
                    known, " (known and not computed), got ", count);
    const int32_t num_blocks = block_size_.blocks_for(seq.num_computed + count + lookahead);
    if (const int32_t num_missing = num_blocks - seq.table.size(); num_missing > 0) {
      need.num_missing += num_missing;
      if (need.num_missing <= allocator_.num_available())
        visited_[i]->table.reserve_more(num_missing);
    }
    if (companions_) {
      const int64_t reach = seq.num_computed + count + lookahead;
      need.num_missing += missing_in_groups(seq, reach, reach);
      for (GroupTable& group : visited_[i]->groups)
        if (need.num_missing <= allocator_.num_available())
          group.table.reserve_more(std::max(0, num_blocks - group.table.size()));
    }
    need.size.max_blocks = std::max(need.size.max_blocks, num_blocks);
    need.size.num_entries += num_blocks;
    need.size.num_new_tokens += count;
  }
  QUIRE_CHECK_ARG(batch_.may_hold(need.size), "step: seqs: expected a block table of less than ",
                  "2^31 entries, got ", need.size.batch_size, " rows of ", need.size.max_blocks);
  return need;
}

// Whether the next token goes to a block that others see too: other holders, or the prefix cache.
bool KVCacheManager::shares_last_block(const Sequence& seq, int32_t group) const {
  const bool is_state = group > 0 && companions_->is_state(group);
  if (is_state ? seq.num_computed == 0 : block_size_.offset(seq.num_computed) == 0) return false;
  const BlockTable& table = group == 0 ? seq.table : seq.groups[group - 1].table;
  const int64_t index = is_state ? 0 : block_size_.index(seq.num_computed);
  return !allocator_.is_own(table[static_cast<int32_t>(index)]);
}

// Finds the writes into blocks that others see too. The last holder of a block that is not cached
// may write in place, so references are given up as the copies are found. While steps run, the
// sources stay referenced until this step is retired.
void KVCacheManager::plan_copies(std::span<const int32_t> num_new_tokens, int32_t lookahead) {
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    if (num_new_tokens[i] + lookahead == 0) continue;
    if (shares_last_block(seq)) plan_copy(seq, 0);
    for (int32_t group = 1; companions_ && group < num_groups(); ++group)
      if (shares_last_block(seq, group)) plan_copy(seq, group);
  }
}

void KVCacheManager::plan_copy(Sequence& seq, int32_t group) {
  const bool is_state = group > 0 && companions_->is_state(group);
  const int32_t index = is_state ? 0 : static_cast<int32_t>(seq.num_computed / block_size_);
  const int32_t block = table_of(seq, group)[index];
  const bool dropped = allocator_.refcount(block) > 1 && async_depth_ == 0;
  if (dropped) allocator_.release(block);
  copies_.push_back({&seq, group, index, block, dropped});
}

void KVCacheManager::undo_copies() {
  for (const Copy& copy : copies_)
    if (copy.dropped) allocator_.share(copy.source);
}

// When blocks run out, a cached block that one sequence alone holds is given up to it instead of
// copied. (All idle blocks are evicted by then, so it has no children left.) Returns how many of
// the missing blocks that saves.
int64_t KVCacheManager::take_over(int64_t num_short) {
  int64_t num_saved = 0;
  for (Copy& copy : copies_) {
    if (num_saved >= num_short) break;
    copy.in_place = !copy.dropped && allocator_.refcount(copy.source) == 1;
    num_saved += copy.in_place;
  }
  return num_saved;
}

// Asks for the memory that allocate() takes, and offers of what is evicted for it and its copies.
void KVCacheManager::reserve_blocks(int64_t num_blocks) {
  new_blocks_.reserve(static_cast<size_t>(num_blocks));
  if (!stores_.empty()) offloads_.reserve(static_cast<size_t>(num_blocks) + copies_.size());
}

// Takes the blocks of a whole step into new_blocks_, or none.
bool KVCacheManager::allocate(int64_t num_blocks) {
  const bool can = num_blocks <= allocator_.num_available();
  if (can) reserve_blocks(num_blocks);
  drop_offloads();
  if (!can) return false;
  if (num_blocks > allocator_.num_free()) expire();
  new_blocks_.resize(num_blocks);
  return allocator_.allocate(new_blocks_, [this](int32_t victim) { return evict(victim); });
}

// Takes the blocks of a step and gives up the references on what it copies: all or nothing.
bool KVCacheManager::take_blocks(std::span<const int32_t> num_new_tokens, int32_t lookahead,
                                 StepNeed need) {
  copies_.clear();
  copies_.reserve(visited_.size() * num_groups());
  plan_copies(num_new_tokens, lookahead);
  need.size.num_copies = static_cast<int64_t>(copies_.size());
  int64_t num_blocks = need.num_missing + need.size.num_copies;
  num_blocks -= take_over(std::max<int64_t>(0, num_blocks - allocator_.num_available()));
  try {
    if (num_blocks <= allocator_.num_available()) {  // else a lookahead may reach any distance
      reserve_releases(need.size.num_copies);
      batch_.reserve(need.size);
      for (int32_t group = 1; group < num_groups(); ++group)
        group_batches_[group - 1].reserve(size_of(group, need.size));
    }
    if (!allocate(num_blocks)) {
      undo_copies();
      return false;
    }
  } catch (const std::bad_alloc&) {
    undo_copies();
    throw;
  }
  batch_.begin(++last_ticket_, need.size);
  for (int32_t group = 1; group < num_groups(); ++group)
    group_batches_[group - 1].begin(last_ticket_, size_of(group, need.size));
  return true;
}

// Gives up what a cached block holds, and first what depends on it: returns the block to take.
int32_t KVCacheManager::evict(int32_t victim) {
  if (!companions_ || !companions_->contains(victim)) {
    while (cache_->has_children(victim)) victim = cache_->first_child(victim);
    if (companions_ && companions_->any_of(victim) != CompanionCache::kNone)
      victim = companions_->any_of(victim);
  }
  if (companions_ && companions_->contains(victim)) {
    if (is_watched_) watch_companion_evicted(victim);
    companions_->erase(victim);
  } else {
    if (is_watched_) watch_evicted(victim);
    cache_->erase(victim);
  }
  on_left(victim);
  ++evicted_blocks_;
  return victim;
}

// What a sequence alone holds of a cached block that it is about to write to. All idle blocks are
// evicted by then, so whatever depends on it is in the same sequence's use.
void KVCacheManager::forget(const Copy& copy) {
  int32_t companion = companions_ && copy.group == 0 ? companions_->any_of(copy.source) : -1;
  for (; companion >= 0; companion = companions_->any_of(copy.source)) {
    companions_->erase(companion);
    allocator_.unmark_cached(companion);
  }
  if (copy.group == 0 || companions_->contains(copy.source)) evict(copy.source);
  allocator_.unmark_cached(copy.source);
}

// Moves the copying sequences to the first of new_blocks_; returns the others.
std::span<const int32_t> KVCacheManager::apply_copies() {
  size_t num_taken = 0;
  for (const Copy& copy : copies_) {
    if (copy.in_place) {
      forget(copy);
      continue;
    }
    const int32_t block = new_blocks_[num_taken++];
    (copy.group == 0 ? batch_ : group_batches_[copy.group - 1]).add_copy(copy.source, block);
    table_of(*copy.seq, copy.group).replace(copy.index, block);
    if (!copy.dropped) release(copy.source);
  }
  return std::span(new_blocks_).subspan(num_taken);
}

const StepBatch* KVCacheManager::step(std::span<const SequenceId> seqs,
                                      std::span<const int32_t> num_new_tokens, int32_t lookahead) {
  const std::lock_guard guard(mutex_);
  const bool decodes = lookahead == 0 && num_new_tokens.size() == seqs.size() &&
                       continues_loop(seqs) && all_ones(num_new_tokens);
  if (decodes && loop_.is_running() && !loop_stepped_ && may_step() && fits_loop())
    return step_loop();
  const bool starts_loop =
      decodes && !loop_.is_running() && !companions_ && block_size_ <= DecodeLoop::kMaxBlockSize;
  settle();
  visit("step", seqs);
  const StepNeed need = check_step(num_new_tokens, lookahead);
  if (starts_loop) loop_.reserve(seqs.size(), block_size_);
  if (!take_blocks(num_new_tokens, lookahead, need)) return nullptr;
  std::span<const int32_t> fresh = apply_copies();
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    const int64_t end = seq.num_computed + num_new_tokens[i];
    const int64_t reach = end + lookahead;
    const int32_t num_missing = block_size_.blocks_for(reach) - seq.table.size();
    if (num_missing > 0) {
      seq.table.append(fresh.first(num_missing));
      fresh = fresh.subspan(num_missing);
    }
    seq.num_planned = num_new_tokens[i];
    batch_.add_row(seq.id.value, seq.table, seq.num_computed, end, reach);
    if (companions_) fresh = extend_groups(seq, end, reach, fresh);
  }
  if (starts_loop) begin_loop(seqs);
  return &batch_;
}

// ---- Commit

void KVCacheManager::commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled,
                            std::span<const int32_t> num_sampled) {
  const std::lock_guard guard(mutex_);
  const bool one_each = num_sampled.empty() && !sampled.empty();
  if (one_each && loop_.is_running() && loop_stepped_ && sampled.size() == seqs.size() &&
      continues_loop(seqs) && fits_packed(sampled.data(), static_cast<int32_t>(sampled.size())))
    return commit_loop(sampled);
  settle();
  visit("commit", seqs);
  QUIRE_CHECK_ARG(num_sampled.empty() || num_sampled.size() == seqs.size(),
                  "commit: sampled: expected tokens of ", seqs.size(), " sequences, got of ",
                  num_sampled.size());
  const auto count_of = [&](size_t i) { return num_sampled.empty() ? one_each : num_sampled[i]; };
  int64_t total = 0;
  for (size_t i = 0; i < visited_.size(); ++i) {
    const Sequence& seq = *visited_[i];
    const int32_t count = count_of(i);
    QUIRE_CHECK_ARG(count >= 0, "commit: num_sampled[", i, "]: expected 0 or more, got ", count);
    QUIRE_CHECK_ARG(count == 0 || seq.num_planned == 0 ||
                        seq.num_computed + seq.num_planned == seq.num_tokens(),
                    "commit: sampled: expected no token for seqs[", i, "], whose step left ",
                    seq.num_tokens() - seq.num_computed - seq.num_planned,
                    " known tokens to compute");
    total += count;
  }
  QUIRE_CHECK_ARG(total == static_cast<int64_t>(sampled.size()), "commit: sampled: expected ",
                  total, " tokens, got ", sampled.size());
  for (size_t i = 0; i < visited_.size(); ++i) prepare_advance(*visited_[i], count_of(i));
  int64_t num_released = 0;
  for (size_t i = 0; async_depth_ > 0 && i < visited_.size(); ++i)
    num_released += most_released(*visited_[i]);
  reserve_releases(num_released);
  loop_seqs_.reserve(seqs.size());
  bool one_is_pending = true;
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    advance(seq);
    const int32_t count = count_of(i);
    for (int32_t token : sampled.first(count)) seq.tokens.push_back(token);
    sampled = sampled.subspan(count);
    one_is_pending &= seq.num_tokens() - seq.num_computed == 1;
  }
  if (cache_) cache_->drop_reserved();
  if (one_is_pending) loop_seqs_.assign(seqs.begin(), seqs.end());
}

// Asks for the memory that advance() and so many new tokens take.
void KVCacheManager::prepare_advance(Sequence& seq, int32_t num_new_tokens) {
  reserve_more(seq.tokens, static_cast<size_t>(num_new_tokens));
  if (!cache_ || seq.num_planned == 0) return;
  const int64_t first = block_size_.index(seq.num_computed);
  const int64_t last = block_size_.index(seq.num_computed + seq.num_planned);
  if (first < last)
    cache_->reserve_for(seq.tokens_from(first * block_size_), static_cast<int32_t>(last - first));
}

// At most so many references does advance() give back: of blocks that are cached already, and of
// what groups do not read any more.
int64_t KVCacheManager::most_released(const Sequence& seq) const {
  const int64_t end = seq.num_computed + seq.num_planned;
  int64_t count = (block_size_.index(end) - block_size_.index(seq.num_computed)) * num_groups();
  for (int32_t group = 1; group < num_groups(); ++group)
    if (!companions_->is_state(group))
      count += companions_->first_needed(group, end) - seq.groups[group - 1].num_behind;
  return count;
}

// Planned tokens become computed ones.
void KVCacheManager::advance(Sequence& seq) {
  const int64_t end = seq.num_computed + seq.num_planned;
  if (cache_ && seq.num_planned > 0)
    publish(seq, static_cast<int32_t>(block_size_.index(seq.num_computed)),
            static_cast<int32_t>(block_size_.index(end)));
  if (companions_ && seq.num_planned > 0) advance_groups(seq, end);
  seq.num_computed = end;
  seq.num_planned = 0;
}

// Caches a block that has become full, or gives it up for the cached one of the same tokens.
// Returns which it is. So a parent in the tree is always held by whoever holds its child.
int32_t KVCacheManager::publish(int32_t parent, const int32_t* tokens, int32_t block) {
  const int32_t cached = cache_->insert(parent, tokens, block_size_, block);
  if (cached == block) {
    allocator_.mark_cached(block);
    on_stored(block, {tokens, static_cast<size_t>(block_size_)});
    return block;
  }
  allocator_.share(cached);
  on_hit(cached);
  release(block);
  return cached;
}

// Blocks [first, last) of a sequence. Behind one that is new to the cache all others are, too.
void KVCacheManager::publish(Sequence& seq, int32_t first, int32_t last) {
  bool is_new = false;
  for (; first < last && !is_new; ++first) {
    const int32_t block = seq.table[first];
    is_new = publish(seq, first) == block && !cache_->has_children(block);
  }
  if (first >= last) return;
  const std::span<const int32_t> rest =
      seq.table.own_from(first).first(static_cast<size_t>(last - first));
  const int32_t* tokens = seq.tokens_from(int64_t{first} * block_size_);
  cache_->insert_chain(seq.table[first - 1], tokens, rest);
  for (int32_t block : rest) {
    allocator_.mark_cached(block);
    on_stored(block, {tokens, static_cast<size_t>(block_size_)});
    tokens += block_size_;
  }
}

int32_t KVCacheManager::publish(Sequence& seq, int32_t index) {
  const int32_t parent = index == 0 ? seq.root : seq.table[index - 1];
  const int32_t block = seq.table[index];
  const int32_t kept = publish(parent, seq.tokens_from(int64_t{index} * block_size_), block);
  if (kept != block) seq.table.replace(index, kept);
  return kept;
}

}  // namespace quire
