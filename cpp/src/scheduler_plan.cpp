// SPDX-License-Identifier: Apache-2.0
// schedule(): which tokens of which requests the next step computes.
#include <algorithm>
#include <new>
#include <utility>

#include "quire/error.h"
#include "quire/scheduler.h"
#include "reserve_more.h"

namespace quire {

const ScheduledBatch* Scheduler::schedule() {
  const auto lock = manager_.lock();
  QUIRE_CHECK_ARG(!is_scheduled_, "schedule: expected commit() of the batch before");
  QUIRE_CHECK_ARG(manager_.may_step(), "schedule: expected retire() of the oldest step before");
  decisions_.clear();
  if (num_to_go_on_ > 0 && known_block() != Blocked::kUnknown && go_on()) return &batch_;
  catch_up();
  plan_running();
  if (make_room())
    blocked_ = Blocked::kMadeRoom;
  else
    admit();
  if (rows_.empty() && swap_ins_.empty()) return nullptr;
  write_batch();
  is_scheduled_ = true;
  return &batch_;
}

// ---- All rows decode on

// Why nobody can be admitted beside rows of one token each, as far as can be told at once.
Scheduler::Blocked Scheduler::known_block() const {
  if (queue_.empty()) return Blocked::kNobodyWaits;
  if (static_cast<int32_t>(running_.size()) >= config_.max_seqs) return Blocked::kMaxSeqs;
  if (static_cast<int32_t>(rows_.size()) >= config_.max_tokens_per_step) return Blocked::kBudget;
  const bool is_short = head_ >= 0 && manager_.allocator().num_available() < head_needs_;
  return is_short ? Blocked::kBlocks : Blocked::kUnknown;
}

// Null: out of blocks.
const ScheduledBatch* Scheduler::go_on() {
  if (num_lagging_ == 0) counts_.assign(rows_.size(), 1);
  batch_.token_ids.resize(next_tokens_.size());
  const StepBatch* step = manager_.step(seqs_, counts_);
  if (!step) return nullptr;
  batch_.step = step;
  blocked_ = known_block();
  batch_.num_preempted = std::exchange(num_preempted_, 0);
  batch_.swap_out.resize(0);  // who is preempted or admitted ends the going on
  batch_.swap_in.resize(0);
  if (num_lagging_ == 0) std::fill(batch_.num_new_tokens.begin(), batch_.num_new_tokens.end(), 1);
  std::copy(next_tokens_.begin(), next_tokens_.end(), batch_.token_ids.begin());
  budget_ = config_.max_tokens_per_step - static_cast<int32_t>(rows_.size());
  is_scheduled_ = true;
  return &batch_;
}

// ---- Running requests

// New blocks that a running request needs to reach its token `end`.
int32_t Scheduler::missing_blocks(const Request& request, int64_t end) const {
  if (request.is_fresh || manager_.num_groups() > 1)
    return manager_.num_missing_blocks(request.seq, end, config_.max_tokens_per_step);
  return block_size_.blocks_for(end) - block_size_.blocks_for(request.num_computed);
}

// The next tokens of a running request, within the budget. A state is cached where a step ends with
// a block, so prompts are then computed up to such a place first.
Scheduler::Row Scheduler::plan_row(int32_t slot, int32_t budget) const {
  const Request& request = requests_[slot];
  const int64_t num_left = request.num_tokens - request.num_computed;
  int32_t num_new = static_cast<int32_t>(std::min<int64_t>(num_left, budget));
  if (caches_states_) {
    const int64_t beyond = block_size_.offset(request.num_computed + num_new);
    if (num_new > beyond) num_new -= static_cast<int32_t>(beyond);
  }
  return {slot, num_new, missing_blocks(request, request.num_computed + num_new),
          num_new == num_left};
}

void Scheduler::plan_running() {
  rows_.clear();
  budget_ = config_.max_tokens_per_step;
  num_missing_ = num_promised_ = 0;
  for (int32_t slot : running_) {
    const Row row = plan_row(slot, budget_);
    const Request& request = requests_[slot];
    num_promised_ += row.samples ? row.num_missing : missing_blocks(request, request.num_tokens);
    if (row.num_new == 0) continue;  // the budget is spent
    rows_.push_back(row);
    budget_ -= row.num_new;
    num_missing_ += row.num_missing;
  }
}

// Makes the rows fit the free blocks; returns whether that took something from a request.
bool Scheduler::make_room() {
  bool had_to = false;
  while (num_missing_ > manager_.allocator().num_available() && !rows_.empty()) {
    had_to = true;
    // Blocks that come back with retire() are worth a pause, not another preemption. And who was
    // swapped in for a batch that ran out of memory can't leave before its copies were made.
    const bool pause = !swap_ins_.empty() || num_missing_ <= manager_.allocator().num_available() +
                                                                 manager_.num_deferred_refs();
    if (pause || rows_.back().slot == running_.back()) {
      num_missing_ -= rows_.back().num_missing;
      budget_ += rows_.back().num_new;
      rows_.pop_back();
    }
    if (!pause) preempt_last();
  }
  return had_to;
}

void Scheduler::preempt_last() {
  const int32_t slot = running_.back();
  Request& request = requests_[slot];
  reserve_more(decisions_, 1);
  reserve_more(swap_outs_, 1);
  queue_.push_front(slot);
  try {
    if (!prefers_swap(request) || !swap_out(request)) {
      manager_.detach(request.seq);
      decisions_.push_back({Decision::kPreempted, request.id, request.num_computed, 0});
    }
  } catch (const std::bad_alloc&) {
    queue_.leave(slot);
    throw;
  }
  running_.pop_back();
  request.state = State::kWaiting;
  request.num_computed = 0;
  forget_head();
  ++num_preemptions_;
  ++num_preempted_;
}

// ---- Swapping

// Leading blocks that others hold too will be cached when the request comes back.
bool Scheduler::prefers_swap(const Request& request) const {
  if (!may_swap_) return false;
  const std::vector<int32_t> blocks = manager_.block_table(request.seq);
  const BlockAllocator& pool = manager_.allocator();
  const auto is_own = [&](int32_t block) { return pool.refcount(block) == 1; };
  const int64_t num_shared = std::find_if(blocks.begin(), blocks.end(), is_own) - blocks.begin();
  const int64_t num_kept = std::min(num_shared * pool.block_size(), request.num_computed);
  int32_t num_own = static_cast<int32_t>(static_cast<int64_t>(blocks.size()) - num_shared);
  for (int32_t group = 1; group < manager_.num_groups(); ++group)
    for (int32_t block : manager_.block_table(request.seq, group)) num_own += block >= 0;
  return estimate_preemption(request.num_computed, num_kept, num_own, config_.preemption).cheaper ==
         Preemption::kSwap;
}

// False: no room in host memory.
bool Scheduler::swap_out(Request& request) {
  auto pairs = manager_.swap_out(request.seq);
  if (!pairs) return false;
  request.num_swapped = request.num_computed;
  decisions_.push_back({Decision::kSwappedOut, request.id, request.num_computed, 0});
  swap_outs_.push_back({request.id, std::move(*pairs)});
  return true;
}

// Gives a request that is admitted what there is of its KV: from host memory (true), or from the
// cache where that has as many tokens.
bool Scheduler::come_back(Request& request, int64_t num_cached) {
  if (request.num_swapped > num_cached) {
    const int32_t most_blocks =
        manager_.num_missing_blocks(request.seq, request.num_tokens, config_.max_tokens_per_step);
    reserve_more(swap_ins_, static_cast<size_t>(most_blocks));
    reserve_more(offloads_, static_cast<size_t>(most_blocks));
    const auto pairs = manager_.swap_in(request.seq);
    QUIRE_INVARIANT(pairs, "schedule: admitted a request that does not fit");
    request.num_swapped = 0;
    const std::vector<KVTransfer> evicted = manager_.take_offloads();
    offloads_.insert(offloads_.end(), evicted.begin(), evicted.end());
    num_promised_ -= static_cast<int64_t>(pairs->size());
    swap_ins_.insert(swap_ins_.end(), pairs->begin(), pairs->end());
    return true;
  }
  if (request.num_swapped == 0 && manager_.num_groups() == 1) {
    manager_.attach_matched(request.seq, num_cached);
    return false;
  }
  give_up_swapped(request);
  manager_.attach(request.seq);
  return false;
}

void Scheduler::give_up_swapped(Request& request) {
  if (std::exchange(request.num_swapped, 0) > 0) manager_.detach(request.seq);
}

void Scheduler::write_swaps() {
  size_t num_out = 0;
  for (const SwapOut& swap : swap_outs_) num_out += swap.pairs.size();
  batch_.swap_out.resize(2 * num_out);
  batch_.swap_in.resize(2 * swap_ins_.size());
  int32_t* next = batch_.swap_out.data();
  for (const SwapOut& swap : swap_outs_)
    for (const auto& pair : swap.pairs) next = std::copy(pair.begin(), pair.end(), next);
  next = batch_.swap_in.data();
  for (const auto& pair : swap_ins_) next = std::copy(pair.begin(), pair.end(), next);
}

// ---- Admission

void Scheduler::forget_head() {
  head_ = leader_ = -1;
  head_needs_ = 0;
}

// The request that comes next; where several may, the one with the longest cached prefix.
int32_t Scheduler::choose_next() {
  const std::span<const int32_t> candidates = queue_.next(config_.prefix_window);
  int32_t best = candidates[0];
  int64_t longest = -1;
  for (size_t i = 0; i < candidates.size() && candidates.size() > 1; ++i) {
    const Request& request = requests_[candidates[i]];
    const int64_t length = std::max(request.num_swapped, manager_.match(request.seq).num_tokens);
    if (length <= longest) continue;
    longest = length;
    best = candidates[i];
  }
  return best;
}

void Scheduler::admit() {
  for (;;) {
    const size_t num_admitted = decisions_.size();
    blocked_ = admit_next();
    if (decisions_.size() == num_admitted) return;
  }
}

// Admits the next request, or tells why not.
Scheduler::Blocked Scheduler::admit_next() {
  if (queue_.empty()) return Blocked::kNobodyWaits;
  if (budget_ == 0) return Blocked::kBudget;
  if (static_cast<int32_t>(running_.size()) >= config_.max_seqs) return Blocked::kMaxSeqs;
  if (const int32_t next = head_ >= 0 ? head_ : choose_next(); next != head_) {
    forget_head();
    head_ = next;
  }
  Request& request = requests_[head_];
  if (waits_for_prefix(request)) return Blocked::kPrefix;
  const BlockAllocator& pool = manager_.allocator();
  const int64_t num_unpromised = pool.num_available() - num_promised_;
  if (!running_.empty() && num_unpromised < head_needs_) return Blocked::kBlocks;
  PrefixMatch match = manager_.match(request.seq);
  int64_t num_missing =
      manager_.num_missing_blocks(request.seq, request.num_tokens, config_.max_tokens_per_step);
  if (manager_.num_groups() > 1 && request.num_swapped > match.num_tokens) {
    // Of a window it needs other blocks than the hit has, so that the hit saves nothing for sure.
    if (!running_.empty() || num_missing <= num_unpromised)
      match = {};
    else
      give_up_swapped(request);  // it has to come in now, and does not fit
  }
  num_missing -= match.num_blocks;
  head_needs_ =
      num_missing + match.num_idle_blocks + (running_.empty() ? 0 : num_watermark_blocks_);
  if (num_unpromised < head_needs_) return Blocked::kBlocks;
  num_promised_ += num_missing;
  start_running(head_, match.num_tokens);
  return Blocked::kNobodyWaits;
}

void Scheduler::start_running(int32_t slot, int64_t num_cached) {
  Request& request = requests_[slot];
  reserve_more(running_, 1);
  reserve_more(decisions_, 1);
  reserve_more(rows_, 1);
  const bool is_swapped_in = come_back(request, num_cached);
  queue_.pop(slot);
  forget_head();
  request.state = State::kRunning;
  request.is_fresh = true;
  request.num_computed = manager_.num_computed_tokens(request.seq);
  const auto ranks_lower = [&](int32_t other) {
    return queue_.priority(other) < queue_.priority(slot);
  };
  auto position = running_.end();
  while (position != running_.begin() && ranks_lower(*(position - 1))) --position;
  running_.insert(position, slot);
  const Row row = plan_row(slot, budget_);
  decisions_.push_back({is_swapped_in ? Decision::kSwappedIn : Decision::kAdmitted, request.id,
                        row.num_new, request.num_computed});
  budget_ -= row.num_new;
  rows_.push_back(row);
}

// Whether a running request is about to compute more of the head's prefix than is cached. Then
// the head is better off one step later: it shares those blocks instead of computing them too.
bool Scheduler::waits_for_prefix(const Request& head) {
  if (!manager_.prefix_caching() || head.num_swapped > 0) return false;
  if (leader_ >= 0) {
    const auto found = slots_.find(leader_);
    if (found != slots_.end() && requests_[found->second].state == State::kRunning &&
        requests_[found->second].num_computed < leader_tokens_)
      return true;
    leader_ = -1;
    head_needs_ = 0;
  }
  const int32_t block_size = manager_.allocator().block_size();
  const int64_t most = (head.num_tokens - 1) / block_size * block_size;
  int64_t longest = 0;
  for (int32_t slot : running_) {
    const Request& other = requests_[slot];
    if (other.num_tokens - other.num_computed <= 1) continue;  // not in prefill
    const int64_t least = std::max(longest, other.num_computed);
    const int64_t shared = std::min(most, manager_.shareable_tokens(head.seq, other.seq, least));
    if (shared <= least) continue;
    longest = shared;
    leader_ = other.id;
  }
  if (longest > 0 && longest > manager_.match(head.seq).num_tokens) {
    leader_tokens_ = longest;
    return true;
  }
  leader_ = -1;
  return false;
}

void Scheduler::write_batch() {
  seqs_.resize(rows_.size());
  write_swaps();
  batch_.request_ids.resize(rows_.size());
  batch_.num_new_tokens.resize(rows_.size());
  batch_.sampling.resize(rows_.size());
  batch_.sampling.resize(0);
  batch_.token_ids.resize(config_.max_tokens_per_step - budget_);
  int32_t* token_ids = batch_.token_ids.data();
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    const Request& request = requests_[row.slot];
    seqs_[i] = request.seq;
    batch_.request_ids[i] = request.id;
    batch_.num_new_tokens[i] = row.num_new;
    if (row.samples)
      batch_.sampling.push_back(static_cast<int32_t>(i));
    else
      decisions_.push_back({Decision::kChunked, request.id,
                            request.num_tokens - request.num_computed - row.num_new, 0});
    if (row.samples && row.num_new == 1) {
      *token_ids++ = request.last_token;
      continue;
    }
    const auto pending = manager_.pending_tokens(request.seq).first(row.num_new);
    token_ids = std::copy(pending.begin(), pending.end(), token_ids);
  }
  batch_.step = manager_.step(seqs_, {batch_.num_new_tokens.data(), batch_.num_new_tokens.size()});
  swap_outs_.clear();
  swap_ins_.clear();
  if (!offloads_.empty()) manager_.offer_also(std::exchange(offloads_, {}));
  batch_.num_preempted = std::exchange(num_preempted_, 0);
  QUIRE_INVARIANT(batch_.step != nullptr, "schedule: planned more blocks than there are");
}

}  // namespace quire
