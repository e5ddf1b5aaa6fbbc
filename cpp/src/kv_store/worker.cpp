// SPDX-License-Identifier: Apache-2.0
#include "kv_store/worker.h"

#include "quire/error.h"

namespace quire {

StoreWorker::StoreWorker(int32_t max_pending, StoreWork work)
    : max_pending_(static_cast<size_t>(max_pending)), work_(std::move(work)) {
  QUIRE_CHECK_ARG(max_pending >= 1, "KVStore: max_pending: expected 1 or more, got ", max_pending);
  try {
    threads_.emplace_back([this] { serve(!work_.gets_have_a_thread, true); });
    if (work_.gets_have_a_thread) threads_.emplace_back([this] { serve(true, false); });
  } catch (...) {  // no memory, or no thread, for the second
    stop();
    throw;
  }
}

StoreWorker::~StoreWorker() { stop(); }

void StoreWorker::stop() {
  {
    const std::lock_guard lock(mutex_);
    stops_ = true;
  }
  has_work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

std::shared_ptr<KVTicket> StoreWorker::submit(Queue& queue, StoreRequest request) {
  auto ticket = std::make_shared<KVTicket>();
  {
    const std::lock_guard lock(mutex_);
    if (queue.size() >= max_pending_) {
      ++not_taken_;
      return nullptr;
    }
    queue.push_back({std::move(request), ticket});
    ++num_pending_;
  }
  has_work_.notify_all();
  return ticket;
}

// The next get, or else the next puts; waits for them. Empty: the store goes.
StoreWorker::Batch StoreWorker::take(bool gets, bool puts) {
  std::unique_lock lock(mutex_);
  const auto has_get = [&] { return gets && !gets_.empty(); };
  const auto has_put = [&] { return puts && !puts_.empty(); };
  has_work_.wait(lock, [&] { return stops_ || has_get() || has_put(); });
  Batch batch;
  batch.is_puts = !has_get();
  if (batch.is_puts && !has_put()) return batch;
  Queue& queue = batch.is_puts ? puts_ : gets_;
  const size_t most = batch.is_puts ? work_.max_batch : 1;
  for (; !queue.empty() && batch.requests.size() < most; queue.pop_front()) {
    batch.requests.push_back(std::move(queue.front().request));
    batch.tickets.push_back(std::move(queue.front().ticket));
  }
  return batch;
}

void StoreWorker::serve(bool gets, bool puts) {
  for (;;) {
    int64_t count;
    {
      const Batch batch = take(gets, puts);
      count = static_cast<int64_t>(batch.requests.size());
      if (count == 0) return;
      run(batch);
    }  // what the callbacks own is destroyed outside the lock
    const std::lock_guard lock(mutex_);
    num_pending_ -= count;
    if (num_pending_ == 0) is_idle_.notify_all();
  }
}

void StoreWorker::run(const Batch& batch) {
  std::vector<KVOutcome> outcomes(batch.requests.size(), KVOutcome::kFailed);
  try {
    if (batch.is_puts)
      work_.put(batch.requests, outcomes);
    else
      outcomes[0] = work_.get(batch.requests[0]);
  } catch (...) {  // out of memory; the caller learns it from the outcome
    outcomes.assign(outcomes.size(), KVOutcome::kFailed);
  }
  for (size_t i = 0; i < outcomes.size(); ++i) {
    if (outcomes[i] == KVOutcome::kFailed) ++failed_;
    try {
      if (batch.requests[i].on_done) batch.requests[i].on_done(outcomes[i]);
    } catch (...) {
      ++callback_errors_;
    }
    batch.tickets[i]->complete(outcomes[i]);
  }
}

void StoreWorker::drain() {
  std::unique_lock lock(mutex_);
  is_idle_.wait(lock, [&] { return num_pending_ == 0; });
}

void StoreWorker::add_stats(KVStoreStats& stats) const {
  const std::lock_guard lock(mutex_);
  stats.num_pending = num_pending_;
  stats.not_taken = not_taken_;
  stats.failed = failed_;
  stats.callback_errors = callback_errors_;
}

}  // namespace quire
