// SPDX-License-Identifier: Apache-2.0
#include "quire/scheduler.h"

#include <algorithm>
#include <new>
#include <utility>

#include "quire/error.h"
#include "reserve_more.h"

namespace quire {

namespace {

constexpr int64_t kSampledWeight = 2;  // of a sampled token, beside 1 for computing it

}  // namespace

Scheduler::Scheduler(KVCacheManager& manager, const SchedulerConfig& config)
    : manager_(manager),
      config_(config),
      block_size_(manager.allocator().block_size()),
      caches_states_(manager.caches_states()),
      queue_(config.max_overtakes) {
  QUIRE_CHECK_ARG(config.max_tokens_per_step >= 1,
                  "Scheduler: max_tokens_per_step: expected 1 or more, got ",
                  config.max_tokens_per_step);
  QUIRE_CHECK_ARG(config.max_seqs >= 1, "Scheduler: max_seqs: expected 1 or more, got ",
                  config.max_seqs);
  QUIRE_CHECK_ARG(config.watermark >= 0 && config.watermark < 1,
                  "Scheduler: watermark: expected a share in [0, 1), got ", config.watermark);
  QUIRE_CHECK_ARG(config.prefix_window >= 1, "Scheduler: prefix_window: expected 1 or more, got ",
                  config.prefix_window);
  QUIRE_CHECK_ARG(config.max_overtakes >= 0, "Scheduler: max_overtakes: expected 0 or more, got ",
                  config.max_overtakes);
  const PreemptionCosts& costs = config.preemption;
  QUIRE_CHECK_ARG(costs.seconds_per_token >= 0 && costs.seconds_per_token_pair >= 0 &&
                      costs.bytes_per_second >= 0 && costs.seconds_per_swap >= 0 &&
                      costs.bytes_per_block >= 0,
                  "Scheduler: preemption: expected costs of 0 or more");
  num_watermark_blocks_ = static_cast<int32_t>(config.watermark * manager.allocator().num_blocks());
  may_swap_ = costs.bytes_per_second > 0 && manager.stats().num_host_blocks > 0;
}

Scheduler::~Scheduler() {
  const auto lock = manager_.lock();
  for (const Request& request : requests_) {
    if (request.state == State::kEnded) continue;
    try {
      manager_.free({&request.seq, 1});
    } catch (const std::bad_alloc&) {   // it stays with the manager
    } catch (const InvalidArgument&) {  // another user of the manager has freed it
    }
  }
}

int32_t Scheduler::add(std::span<const int32_t> token_ids, int32_t max_new_tokens, Salt salt,
                       const RequestOptions& options) {
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
  try {
    if (unused_slots_.empty()) {
      reserve_more(requests_, 1);
      unused_slots_.reserve(requests_.capacity());  // end() must not throw
      unused_slots_.push_back(static_cast<int32_t>(requests_.size()));
      requests_.emplace_back();
    }
    slots_.emplace(next_id_, unused_slots_.back());
    queue_.add(unused_slots_.back(), options.tenant, options.priority);
  } catch (const std::bad_alloc&) {
    slots_.erase(next_id_);
    manager_.close(seq);
    throw;
  }
  const int32_t slot = unused_slots_.back();
  unused_slots_.pop_back();
  Request& request = requests_[slot];
  request = {State::kWaiting, false, next_id_, max_new_tokens, token_ids.back(), seq};
  request.num_tokens = static_cast<int64_t>(token_ids.size());
  if (head_ >= 0 && (config_.prefix_window > 1 || queue_.next(1)[0] != head_)) forget_head();
  return next_id_++;
}

// ---- commit() and finish()

std::span<const int32_t> Scheduler::commit(std::span<const int32_t> sampled) {
  const auto lock = manager_.lock();
  QUIRE_CHECK_ARG(is_scheduled_, "commit: expected a schedule() before");
  QUIRE_CHECK_ARG(sampled.size() == batch_.sampling.size(),
                  "commit: sampled: expected one token a sampling row, ", batch_.sampling.size(),
                  ", got ", sampled.size());
  if (!is_committed_) {
    finished_.clear();
    finished_.reserve(rows_.size());
    if (num_to_go_on_ > 0)
      commit_going_on(sampled);
    else
      commit_rows(sampled);
    is_committed_ = true;
  }
  if (num_to_go_on_ == 0) end_finished();
  is_scheduled_ = is_committed_ = false;
  if (num_to_go_on_ == 0 && finished_.empty()) begin_going_on();
  return finished_;
}

void Scheduler::commit_going_on(std::span<const int32_t> sampled) {
  manager_.commit(seqs_, sampled);
  std::copy(sampled.begin(), sampled.end(), next_tokens_.begin());
  ++num_lagging_;
  if (num_lagging_ == num_to_go_on_) catch_up();
}

void Scheduler::commit_rows(std::span<const int32_t> sampled) {
  leave_out_finished(sampled);
  manager_.commit(seqs_, next_tokens_, counts_);
  auto next_token = next_tokens_.begin();
  for (const Row& row : rows_) {
    if (row.slot < 0) continue;
    Request& request = requests_[row.slot];
    if (row.samples) request.last_token = *next_token++;
    request.is_fresh = false;
    request.num_computed += row.num_new;
    request.num_tokens += row.samples;
    request.num_left -= row.samples;
    queue_.charge(row.slot, row.num_new + kSampledWeight * row.samples);
  }
}

// What the manager is to commit: the batch but for requests that were finished meanwhile.
void Scheduler::leave_out_finished(std::span<const int32_t> sampled) {
  next_tokens_.assign(sampled.begin(), sampled.end());
  seqs_.resize(rows_.size());
  counts_.resize(rows_.size());
  size_t num_left = 0, num_tokens = 0, next_sampled = 0;
  for (const Row& row : rows_) {
    if (row.slot >= 0) {
      seqs_[num_left] = requests_[row.slot].seq;
      counts_[num_left++] = row.samples;
      if (row.samples) next_tokens_[num_tokens++] = next_tokens_[next_sampled];
    }
    next_sampled += row.samples;
  }
  seqs_.resize(num_left);
  counts_.resize(num_left);
  next_tokens_.resize(num_tokens);
}

// What has no memory for all of them goes on with the others when it is called again.
void Scheduler::end_finished() {
  try {
    for (Row& row : rows_) {
      if (row.slot < 0 || requests_[row.slot].num_left > 0) continue;
      end(row.slot);
      finished_.push_back(requests_[row.slot].id);
      row.slot = -1;
    }
  } catch (const std::bad_alloc&) {
    remove_ended();
    throw;
  }
  if (!finished_.empty()) remove_ended();
}

// After a commit of all running requests, each of which now has one token to compute.
void Scheduler::begin_going_on() {
  if (rows_.empty() || rows_.size() != running_.size() || next_tokens_.size() != rows_.size())
    return;
  num_to_go_on_ = INT32_MAX;
  for (Row& row : rows_) {
    row.num_new = 1;
    num_to_go_on_ = std::min(num_to_go_on_, requests_[row.slot].num_left);
  }
}

// Counts up the commits that requests lag behind; the rows don't go on as they are.
void Scheduler::catch_up() {
  const int32_t count = std::exchange(num_lagging_, 0);
  num_to_go_on_ = 0;
  if (count == 0) return;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    Request& request = requests_[row.slot];
    request.last_token = next_tokens_[i];
    request.num_computed += count;
    request.num_tokens += count;
    request.num_left -= count;
    queue_.charge(row.slot, (1 + kSampledWeight) * count);
  }
}

// Forgets a request; the caller takes it out of running_.
void Scheduler::end(int32_t slot) {
  Request& request = requests_[slot];
  manager_.free({&request.seq, 1});
  slots_.erase(request.id);
  queue_.remove(slot);
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
    end(slot);
    if (slot == head_) forget_head();
    std::erase_if(swap_outs_, [&](const SwapOut& swap) { return swap.id == request_id; });
    return;
  }
  catch_up();
  end(slot);
  for (Row& row : rows_)
    if (is_scheduled_ && row.slot == slot) row.slot = -1;
  remove_ended();
}

int32_t Scheduler::num_running() const {
  const auto lock = manager_.lock();
  return static_cast<int32_t>(running_.size());
}

int32_t Scheduler::num_waiting() const {
  const auto lock = manager_.lock();
  return queue_.size();
}

int64_t Scheduler::num_preemptions() const {
  const auto lock = manager_.lock();
  return num_preemptions_;
}

bool Scheduler::has_work() const {
  const auto lock = manager_.lock();
  return !running_.empty() || !queue_.empty();
}

void Scheduler::validate() const {
  const auto lock = manager_.lock();
  manager_.validate();
  size_t num_running = 0;
  for (const auto& [id, slot] : slots_) {
    const Request& request = requests_[slot];
    const bool runs = request.state == State::kRunning;
    const int32_t lag = runs ? num_lagging_ : 0;
    QUIRE_INVARIANT(request.id == id && request.state != State::kEnded, "request ", id, ": lost");
    QUIRE_INVARIANT(request.num_left > lag || is_committed_, "request ", id, ": should have ended");
    QUIRE_INVARIANT(request.num_tokens + lag == manager_.num_tokens(request.seq) &&
                        request.num_computed + lag == manager_.num_computed_tokens(request.seq),
                    "request ", id, ": its tokens are counted wrongly");
    QUIRE_INVARIANT(runs || manager_.block_table(request.seq).empty(), "request ", id,
                    ": waits with blocks");
    QUIRE_INVARIANT((request.num_swapped > 0) == manager_.is_swapped_out(request.seq), "request ",
                    id, ": in the wrong memory");
    num_running += runs;
  }
  for (int32_t slot : running_)
    QUIRE_INVARIANT(requests_[slot].state == State::kRunning, "request ", requests_[slot].id,
                    ": in the wrong queue");
  QUIRE_INVARIANT(num_running == running_.size() &&
                      slots_.size() == num_running + static_cast<size_t>(queue_.size()),
                  "a request is in no queue");
  QUIRE_INVARIANT(requests_.size() == slots_.size() + unused_slots_.size(), "a slot is lost");
}

// ---- explain()

std::string Scheduler::explain() const {
  const auto lock = manager_.lock();
  const BlockAllocator& pool = manager_.allocator();
  std::string text = concat(
      "running ", running_.size(), " of at most ", config_.max_seqs, ", waiting ", queue_.size(),
      "; step of ", rows_.size(), " rows, ", config_.max_tokens_per_step - budget_, " of ",
      config_.max_tokens_per_step, " tokens; blocks: ", pool.num_available(), " of ",
      pool.num_blocks(), " free or cached, watermark ", num_watermark_blocks_, "\n");
  for (const Decision& decision : decisions_) {
    text += concat("request ", decision.id, ": ");
    if (decision.kind == Decision::kPreempted)
      text += concat("preempted, no block is left; ", decision.num_tokens,
                     " tokens lose theirs and are computed again where no longer cached\n");
    else if (decision.kind == Decision::kSwappedOut)
      text += concat("preempted, no block is left; ", decision.num_tokens,
                     " tokens move to host memory\n");
    else if (decision.kind == Decision::kSwappedIn)
      text += concat("admitted, ", decision.num_cached, " tokens back from host memory, ",
                     decision.num_tokens, " computed in this step\n");
    else if (decision.kind == Decision::kAdmitted)
      text += concat("admitted, ", decision.num_cached, " tokens cached, ", decision.num_tokens,
                     " computed in this step\n");
    else
      text += concat("chunked, ", decision.num_tokens, " tokens left for later steps\n");
  }
  switch (blocked_) {
    case Blocked::kNobodyWaits:
      return text + "no request waits\n";
    case Blocked::kMadeRoom:
      return text + "none admitted: running requests were short of blocks\n";
    case Blocked::kMaxSeqs:
      return text + "no more admitted: max_seqs run\n";
    case Blocked::kBudget:
      return text + "no more admitted: max_tokens_per_step is spent\n";
    default:
      break;
  }
  text += concat("request ", head_ >= 0 ? requests_[head_].id : -1, " comes next: ");
  if (blocked_ == Blocked::kPrefix)
    return text + concat("waits for request ", leader_, ", which computes ", leader_tokens_,
                         " tokens of its prefix\n");
  return text + concat("needs ", head_needs_, " blocks, watermark included, beside ", num_promised_,
                       " promised to running requests\n");
}

}  // namespace quire
