// SPDX-License-Identifier: Apache-2.0
// step() and commit(): of any batch, and of one that decodes on as it is (the loop).
#include <algorithm>
#include <cstring>
#include <utility>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace quire {
namespace {

constexpr int32_t kPrefetched = 4;  // blocks ahead of the one that is published

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
    const int32_t num_blocks = seq.table.blocks_for(seq.num_computed + count + lookahead);
    need.num_missing += std::max(0, num_blocks - seq.table.size());
    if (companions_) {
      const int64_t reach = seq.num_computed + count + lookahead;
      need.num_missing += missing_in_groups(seq, reach, reach);
    }
    need.size.max_blocks = std::max(need.size.max_blocks, num_blocks);
    need.size.num_new_tokens += count;
  }
  QUIRE_CHECK_ARG(batch_.may_hold(need.size), "step: seqs: expected a block table of less than ",
                  "2^31 entries, got ", need.size.batch_size, " rows of ", need.size.max_blocks);
  return need;
}

// Finds the writes into blocks that others see too. The last holder of a block that is not cached
// may write in place, so references are given up as the copies are found. While steps run, the
// sources stay referenced until this step is retired.
void KVCacheManager::plan_copies(std::span<const int32_t> num_new_tokens, int32_t lookahead) {
  copies_.clear();
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    if (num_new_tokens[i] + lookahead == 0) continue;
    for (int32_t group = 0; group < num_groups(); ++group)
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

// Takes the blocks of a whole step into new_blocks_, or none.
bool KVCacheManager::allocate(int64_t num_blocks) {
  offloads_.clear();
  if (num_blocks > allocator_.num_available()) return false;
  if (num_blocks > allocator_.num_free()) expire();
  new_blocks_.resize(num_blocks);
  return allocator_.allocate(new_blocks_, [this](int32_t victim) { return evict(victim); });
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
  StepNeed need = check_step(num_new_tokens, lookahead);
  plan_copies(num_new_tokens, lookahead);
  need.size.num_copies = static_cast<int64_t>(copies_.size());
  const int64_t num_blocks = need.num_missing + need.size.num_copies;
  const int64_t num_short = std::max<int64_t>(0, num_blocks - allocator_.num_available());
  if (!allocate(num_blocks - take_over(num_short))) {
    undo_copies();
    return nullptr;
  }
  batch_.begin(++last_ticket_, need.size);
  begin_group_batches(need.size);
  std::span<const int32_t> fresh = apply_copies();
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    const int64_t end = seq.num_computed + num_new_tokens[i];
    const int64_t reach = end + lookahead;
    const int32_t num_missing = std::max(0, seq.table.blocks_for(reach) - seq.table.size());
    seq.table.append(fresh.first(num_missing));
    fresh = fresh.subspan(num_missing);
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
      continues_loop(seqs))
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
  bool one_is_pending = true;
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    advance(seq);
    const int32_t count = count_of(i);
    seq.tokens.insert(seq.tokens.end(), sampled.begin(), sampled.begin() + count);
    sampled = sampled.subspan(count);
    one_is_pending &= seq.num_tokens() - seq.num_computed == 1;
  }
  if (one_is_pending) loop_seqs_.assign(seqs.begin(), seqs.end());
}

// Planned tokens become computed ones.
void KVCacheManager::advance(Sequence& seq) {
  const int64_t end = seq.num_computed + seq.num_planned;
  const int32_t first = static_cast<int32_t>(seq.num_computed / block_size_);
  const int32_t last = cache_ && seq.num_planned > 0 ? static_cast<int32_t>(end / block_size_) : 0;
  for (int32_t i = first; i < last; ++i) {
    if (i + kPrefetched < last) cache_->prefetch(seq.table[i + kPrefetched]);
    publish(seq, i);
  }
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

int32_t KVCacheManager::publish(Sequence& seq, int32_t index) {
  const int32_t parent = index == 0 ? seq.root : seq.table[index - 1];
  const int32_t block = seq.table[index];
  const int32_t kept = publish(parent, seq.tokens_from(int64_t{index} * block_size_), block);
  if (kept != block) seq.table.replace(index, kept);
  return kept;
}

// ---- The loop

// Whether a call names the sequences of the loop, in order.
bool KVCacheManager::continues_loop(std::span<const SequenceId> seqs) const {
  return !seqs.empty() && seqs.size() == loop_seqs_.size() &&
         std::memcmp(seqs.data(), loop_seqs_.data(), seqs.size_bytes()) == 0;
}

// After a step of one token each of loop_seqs_, none of which has another known token.
void KVCacheManager::begin_loop(std::span<const SequenceId> seqs) {
  for (const Sequence* seq : visited_)  // a lookahead may have left blocks, which come first
    if (seq->table.size() != seq->table.blocks_for(seq->num_tokens())) return;
  loop_seqs_.assign(seqs.begin(), seqs.end());
  loop_.begin({batch_.positions().data(), batch_.positions().size()}, block_size_);
  loop_stepped_ = true;
  for (size_t i = 0; i < visited_.size(); ++i) visited_[i]->row = static_cast<int32_t>(i);
}

// Whether the rows that begin a block have a column left for it.
bool KVCacheManager::fits_loop() const {
  const auto [first, last] = loop_.beginning();
  int32_t most = 0;
  for (int32_t rank = first; rank < last; ++rank) most = std::max(most, loop_.num_blocks(rank));
  return most < batch_.block_table_stride();
}

// Asks for the memory of sequences that lie far apart before any of it is needed.
void KVCacheManager::prefetch_rows(int32_t first_rank, int32_t last_rank, int32_t step) const {
  for (int32_t rank = first_rank; rank < last_rank; rank += step) {
    const Sequence* seq = &sequences_[loop_seqs_[loop_.row(rank)].index()];
    __builtin_prefetch(seq, 1);
    __builtin_prefetch(&seq->was_attached, 1);
  }
  for (int32_t rank = first_rank; rank < last_rank; rank += step) {
    const Sequence& seq = sequences_[loop_seqs_[loop_.row(rank)].index()];
    __builtin_prefetch(seq.tokens.data() + seq.tokens.size(), 1);
    seq.table.prefetch_end();
  }
}

const StepBatch* KVCacheManager::step_loop() {
  const auto [first, last] = loop_.beginning();
  if (!allocate(last - first)) return nullptr;
  for (int32_t rank = first; rank < last; ++rank)
    batch_.prefetch(loop_.row(rank), loop_.num_blocks(rank));
  batch_.advance(++last_ticket_);
  auto replaced = replaced_ranks_.begin();
  for (int32_t rank = first; rank < last; ++rank) {
    const int32_t row = loop_.row(rank), column = loop_.num_blocks(rank);
    const int32_t block = new_blocks_[rank - first];
    if (replaced != replaced_ranks_.end() && *replaced == rank) {
      batch_.replace_block(row, column - 1, loop_.parent(rank));
      sequence_of(loop_seqs_[row]).table.note_written();
      ++replaced;
    }
    batch_.begin_block(row, column, block, int64_t{block} * block_size_);
    loop_.begin_block(rank, block);
  }
  replaced_ranks_.clear();
  loop_stepped_ = true;
  return &batch_;
}

void KVCacheManager::commit_loop(std::span<const int32_t> sampled) {
  const auto [first, last] = loop_.filling();
  if (loop_.fills_first())
    fill_first_blocks(first, last);
  else
    fill_blocks(first, last);
  loop_.commit(sampled);
  loop_stepped_ = false;
}

void KVCacheManager::fill_first_blocks(int32_t first_rank, int32_t last_rank) {
  prefetch_rows(first_rank, last_rank, 1);
  for (int32_t rank = first_rank; rank < last_rank; ++rank) {
    Sequence& seq = sequence_of(loop_seqs_[loop_.row(rank)]);
    loop_.drain_first(rank, &seq.tokens);
    const int32_t index = seq.table.size() - 1;  // the loop has no blocks ahead
    const int32_t block = seq.table[index];
    const int32_t kept = cache_ ? publish(seq, index) : block;
    loop_.set_filled(rank, kept);
    if (kept != block) replaced_ranks_.push_back(rank);
  }
}

void KVCacheManager::fill_blocks(int32_t first_rank, int32_t last_rank) {
  const int32_t first_due = loop_.next_due(first_rank);
  prefetch_rows(first_due, last_rank, loop_.num_kept());
  for (int32_t rank = first_rank; cache_ && rank < last_rank; ++rank) {
    cache_->prefetch(loop_.block(rank));
    cache_->prefetch_node(loop_.parent(rank));
    allocator_.prefetch(loop_.block(rank));
  }
  const auto drain = [this](int32_t rank, bool is_replaced) {
    Sequence& seq = sequence_of(loop_seqs_[loop_.row(rank)]);
    loop_.drain(rank, is_replaced, &seq.table, &seq.tokens);
  };
  loop_.gather();
  for (int32_t rank = first_rank; rank < last_rank; ++rank) {
    const int32_t block = loop_.block(rank);
    const int32_t kept =
        cache_ ? publish(loop_.parent(rank), loop_.filling_tokens(rank), block) : block;
    loop_.set_filled(rank, kept);
    if (kept == block) continue;
    drain(rank, true);
    replaced_ranks_.push_back(rank);
  }
  for (int32_t rank = first_due; rank < last_rank; rank += loop_.num_kept()) drain(rank, false);
}

// Leaves the loop, if it runs: its sequences get their tokens, blocks and counts.
void KVCacheManager::settle() {
  for (int32_t rank = 0; rank < loop_.size(); ++rank) {
    Sequence& seq = sequence_of(loop_seqs_[loop_.row(rank)]);
    loop_.drain_at_end(rank, &seq.table, &seq.tokens);
    seq.num_computed = num_computed(seq);
    seq.num_planned = loop_stepped_;
    seq.row = -1;
  }
  loop_.end();
  loop_seqs_.clear();
  replaced_ranks_.clear();
}

}  // namespace quire
