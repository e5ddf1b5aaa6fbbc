// SPDX-License-Identifier: Apache-2.0
#include "quire/scheduler.h"

#include <algorithm>
#include <utility>

#include "quire/error.h"

namespace quire {

Scheduler::Scheduler(KVCacheManager& manager, const SchedulerConfig& config)
    : manager_(manager), config_(config) {
  QUIRE_CHECK_ARG(config.max_tokens_per_step >= 1,
                  "Scheduler: max_tokens_per_step: expected 1 or more, got ",
                  config.max_tokens_per_step);
  QUIRE_CHECK_ARG(config.max_seqs >= 1, "Scheduler: max_seqs: expected 1 or more, got ",
                  config.max_seqs);
  QUIRE_CHECK_ARG(config.watermark >= 0 && config.watermark < 1,
                  "Scheduler: watermark: expected a share in [0, 1), got ", config.watermark);
  num_watermark_blocks_ = static_cast<int32_t>(config.watermark * manager.allocator().num_blocks());
}

Scheduler::~Scheduler() {
  const auto lock = manager_.lock();
  for (const Request& request : requests_)
    if (request.state != State::kEnded) manager_.free({&request.seq, 1});
}

int32_t Scheduler::add(std::span<const int32_t> token_ids, int32_t max_new_tokens, Salt salt) {
  const auto lock = manager_.lock();
  QUIRE_CHECK_ARG(max_new_tokens >= 1, "add: max_new_tokens: expected 1 or more, got ",
                  max_new_tokens);
  const BlockAllocator& pool = manager_.allocator();
  const int64_t num_tokens = static_cast<int64_t>(token_ids.size()) + max_new_tokens;
  QUIRE_CHECK_ARG(
      manager_.num_blocks_for(num_tokens, config_.max_tokens_per_step) <= pool.num_blocks(),
      "add: token_ids: expected a prompt and max_new_tokens that fit ", pool.num_blocks(),
      " blocks of ", pool.block_size(), ", got ", token_ids.size(), " + ", max_new_tokens,
      " tokens");
  const SequenceId seq = manager_.open(token_ids, salt);
  if (unused_slots_.empty()) {
    unused_slots_.push_back(static_cast<int32_t>(requests_.size()));
    requests_.emplace_back();
  }
  const int32_t slot = unused_slots_.back();
  unused_slots_.pop_back();
  requests_[slot] = {State::kWaiting, next_id_, max_new_tokens, seq};
  slots_[next_id_] = slot;
  waiting_.push_back(slot);
  return next_id_++;
}

// ---- schedule()

const ScheduledBatch* Scheduler::schedule() {
  const auto lock = manager_.lock();
  QUIRE_CHECK_ARG(!is_scheduled_, "schedule: expected commit() of the batch before");
  QUIRE_CHECK_ARG(manager_.may_step(), "schedule: expected retire() of the oldest step before");
  plan_running();
  if (!make_room()) admit();
  if (rows_.empty()) return nullptr;
  write_batch();
  is_scheduled_ = true;
  return &batch_;
}

// The next tokens of a running request, within the budget. A state is cached where a step ends with
// a block, so prompts are then computed up to such a place first.
Scheduler::Row Scheduler::plan_row(int32_t slot, int32_t budget) const {
  const SequenceId seq = requests_[slot].seq;
  const int64_t num_computed = manager_.num_computed_tokens(seq);
  const int64_t num_left = manager_.num_tokens(seq) - num_computed;
  int32_t num_new = static_cast<int32_t>(std::min<int64_t>(num_left, budget));
  const int32_t beyond =
      static_cast<int32_t>((num_computed + num_new) % manager_.allocator().block_size());
  if (manager_.caches_states() && num_new > beyond) num_new -= beyond;
  return {slot, num_new, manager_.num_missing_blocks(seq, num_computed + num_new),
          num_new == num_left};
}

void Scheduler::plan_running() {
  rows_.clear();
  budget_ = config_.max_tokens_per_step;
  num_missing_ = num_promised_ = 0;
  for (int32_t slot : running_) {
    const Row row = plan_row(slot, budget_);
    const SequenceId seq = requests_[slot].seq;
    num_promised_ += row.samples ? row.num_missing
                                 : manager_.num_missing_blocks(seq, manager_.num_tokens(seq),
                                                               config_.max_tokens_per_step);
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
    // Blocks that come back with retire() are worth a pause, not another preemption.
    const bool pause =
        num_missing_ <= manager_.allocator().num_available() + manager_.num_deferred_refs();
    const int32_t latest = running_.back();
    if (pause || rows_.back().slot == latest) {
      num_missing_ -= rows_.back().num_missing;
      budget_ += rows_.back().num_new;
      rows_.pop_back();
    }
    if (!pause) preempt_latest();
  }
  return had_to;
}

void Scheduler::preempt_latest() {
  const int32_t slot = running_.back();
  running_.pop_back();
  manager_.detach(requests_[slot].seq);
  requests_[slot].state = State::kWaiting;
  waiting_.push_front(slot);
  head_needs_ = 0;
  leader_ = -1;
  ++num_preemptions_;
  ++num_preempted_;
}

void Scheduler::admit() {
  const BlockAllocator& pool = manager_.allocator();
  while (!waiting_.empty() && budget_ > 0 && num_running() < config_.max_seqs) {
    if (waits_for_prefix()) return;
    const int64_t num_unpromised = pool.num_available() - num_promised_;
    if (!running_.empty() && num_unpromised < head_needs_) return;
    const int32_t slot = waiting_.front();
    Request& request = requests_[slot];
    const PrefixMatch match = manager_.match(request.seq);
    const int64_t num_missing =
        manager_.num_missing_blocks(request.seq, manager_.num_tokens(request.seq),
                                    config_.max_tokens_per_step) -
        match.num_blocks;
    head_needs_ =
        num_missing + match.num_idle_blocks + (running_.empty() ? 0 : num_watermark_blocks_);
    if (num_unpromised < head_needs_) return;
    head_needs_ = 0;
    waiting_.pop_front();
    manager_.attach(request.seq);
    request.state = State::kRunning;
    running_.push_back(slot);
    rows_.push_back(plan_row(slot, budget_));
    budget_ -= rows_.back().num_new;
    num_promised_ += num_missing;
  }
}

// Whether a running request is about to compute more of the head's prefix than is cached. Then
// the head is better off one step later: it shares those blocks instead of computing them too.
bool Scheduler::waits_for_prefix() {
  if (!manager_.prefix_caching()) return false;
  if (leader_ >= 0) {
    const auto found = slots_.find(leader_);
    if (found != slots_.end() && requests_[found->second].state == State::kRunning &&
        manager_.num_computed_tokens(requests_[found->second].seq) < leader_tokens_)
      return true;
    leader_ = -1;
    head_needs_ = 0;
  }
  const SequenceId head = requests_[waiting_.front()].seq;
  const int32_t block_size = manager_.allocator().block_size();
  const int64_t most = (manager_.num_tokens(head) - 1) / block_size * block_size;
  int64_t longest = 0;
  for (int32_t slot : running_) {
    const SequenceId seq = requests_[slot].seq;
    const int64_t num_computed = manager_.num_computed_tokens(seq);
    if (manager_.num_tokens(seq) - num_computed <= 1) continue;  // not in prefill
    const int64_t shared = std::min(most, manager_.shareable_tokens(head, seq));
    if (shared <= std::max(longest, num_computed)) continue;
    longest = shared;
    leader_ = requests_[slot].id;
  }
  if (longest > 0 && longest > manager_.match(head).num_tokens) {
    leader_tokens_ = longest;
    return true;
  }
  leader_ = -1;
  return false;
}

void Scheduler::write_batch() {
  seqs_.clear();
  batch_.request_ids.resize(rows_.size());
  batch_.num_new_tokens.resize(rows_.size());
  batch_.sampling.resize(rows_.size());
  batch_.sampling.resize(0);
  batch_.token_ids.resize(config_.max_tokens_per_step - budget_);
  int32_t* token_ids = batch_.token_ids.data();
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    const Request& request = requests_[row.slot];
    seqs_.push_back(request.seq);
    batch_.request_ids[i] = request.id;
    batch_.num_new_tokens[i] = row.num_new;
    if (row.samples) batch_.sampling.push_back(static_cast<int32_t>(i));
    const auto pending = manager_.pending_tokens(request.seq).first(row.num_new);
    token_ids = std::copy(pending.begin(), pending.end(), token_ids);
  }
  batch_.step = manager_.step(seqs_, {batch_.num_new_tokens.data(), batch_.num_new_tokens.size()});
  batch_.num_preempted = std::exchange(num_preempted_, 0);
  QUIRE_INVARIANT(batch_.step != nullptr, "schedule: planned more blocks than there are");
}

// ---- commit() and finish()

std::span<const int32_t> Scheduler::commit(std::span<const int32_t> sampled) {
  const auto lock = manager_.lock();
  QUIRE_CHECK_ARG(is_scheduled_, "commit: expected a schedule() before");
  QUIRE_CHECK_ARG(sampled.size() == batch_.sampling.size(),
                  "commit: sampled: expected one token a sampling row, ", batch_.sampling.size(),
                  ", got ", sampled.size());
  is_scheduled_ = false;
  seqs_.clear();
  counts_.clear();
  sampled_.clear();
  size_t next_sampled = 0;
  for (const Row& row : rows_) {
    const size_t i = next_sampled;
    next_sampled += row.samples;
    if (row.slot < 0) continue;
    seqs_.push_back(requests_[row.slot].seq);
    counts_.push_back(row.samples);
    if (row.samples) sampled_.push_back(sampled[i]);
  }
  manager_.commit(seqs_, sampled_, counts_);
  finished_.clear();
  for (const Row& row : rows_) {
    if (row.slot < 0 || !row.samples) continue;
    Request& request = requests_[row.slot];
    if (--request.num_left > 0) continue;
    finished_.push_back(request.id);
    end(row.slot);
  }
  if (!finished_.empty()) remove_ended();
  return finished_;
}

// Forgets a request; the caller takes it out of running_ or waiting_.
void Scheduler::end(int32_t slot) {
  Request& request = requests_[slot];
  manager_.free({&request.seq, 1});
  slots_.erase(request.id);
  request.state = State::kEnded;
  unused_slots_.push_back(slot);
}

void Scheduler::remove_ended() {
  std::erase_if(running_, [&](int32_t slot) { return requests_[slot].state == State::kEnded; });
}

void Scheduler::finish(int32_t request_id) {
  const auto lock = manager_.lock();
  QUIRE_CHECK_ARG(request_id >= 0 && request_id < next_id_,
                  "finish: request_id: expected one that add() returned, got ", request_id);
  const auto found = slots_.find(request_id);
  if (found == slots_.end()) return;
  const int32_t slot = found->second;
  if (requests_[slot].state == State::kWaiting) {
    const auto position = std::find(waiting_.begin(), waiting_.end(), slot);
    if (position == waiting_.begin()) {
      head_needs_ = 0;
      leader_ = -1;
    }
    waiting_.erase(position);
    end(slot);
    return;
  }
  for (Row& row : rows_)
    if (is_scheduled_ && row.slot == slot) row.slot = -1;
  end(slot);
  remove_ended();
}

int32_t Scheduler::num_running() const {
  const auto lock = manager_.lock();
  return static_cast<int32_t>(running_.size());
}

int32_t Scheduler::num_waiting() const {
  const auto lock = manager_.lock();
  return static_cast<int32_t>(waiting_.size());
}

int64_t Scheduler::num_preemptions() const {
  const auto lock = manager_.lock();
  return num_preemptions_;
}

bool Scheduler::has_work() const {
  const auto lock = manager_.lock();
  return !running_.empty() || !waiting_.empty();
}

void Scheduler::validate() const {
  const auto lock = manager_.lock();
  manager_.validate();
  const auto check = [&](int32_t slot, State state) {
    const Request& request = requests_[slot];
    QUIRE_INVARIANT(request.state == state, "request ", request.id, ": in the wrong queue");
    QUIRE_INVARIANT(slots_.at(request.id) == slot, "request ", request.id, ": lost");
    QUIRE_INVARIANT(request.num_left > 0, "request ", request.id, ": should have ended");
    QUIRE_INVARIANT(state == State::kRunning || manager_.block_table(request.seq).empty(),
                    "request ", request.id, ": waits with blocks");
  };
  for (int32_t slot : running_) check(slot, State::kRunning);
  for (int32_t slot : waiting_) check(slot, State::kWaiting);
  QUIRE_INVARIANT(running_.size() + waiting_.size() == slots_.size(), "a request is in no queue");
  QUIRE_INVARIANT(requests_.size() == slots_.size() + unused_slots_.size(), "a slot is lost");
}

}  // namespace quire
