// SPDX-License-Identifier: Apache-2.0
#include "kv_store/worker.h"

#include "quire/error.h"

namespace quire {

StoreWorker::StoreWorker(int32_t max_pending, Run put, Run get)
    : max_pending_(static_cast<size_t>(max_pending)),
      puts_{std::move(put), {}},
      gets_{std::move(get), {}} {
  QUIRE_CHECK_ARG(max_pending >= 1, "KVStore: max_pending: expected 1 or more, got ", max_pending);
  thread_ = std::thread([this] { work(); });
}

StoreWorker::~StoreWorker() {
  {
    const std::lock_guard lock(mutex_);
    stops_ = true;
  }
  has_work_.notify_all();
  thread_.join();
}

std::shared_ptr<KVTicket> StoreWorker::submit(Queue& queue, StoreRequest request) {
  auto ticket = std::make_shared<KVTicket>();
  {
    const std::lock_guard lock(mutex_);
    if (queue.waiting.size() >= max_pending_) {
      ++not_taken_;
      return nullptr;
    }
    queue.waiting.push_back({std::move(request), ticket});
    ++num_pending_;
  }
  has_work_.notify_one();
  return ticket;
}

void StoreWorker::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    has_work_.wait(lock,
                   [&] { return stops_ || !gets_.waiting.empty() || !puts_.waiting.empty(); });
    Queue& queue = gets_.waiting.empty() ? puts_ : gets_;
    if (queue.waiting.empty()) return;
    {
      const Taken taken = std::move(queue.waiting.front());
      queue.waiting.pop_front();
      lock.unlock();
      run(queue.run, taken);
    }  // what the callback owns is destroyed outside the lock
    lock.lock();
    if (--num_pending_ == 0) is_idle_.notify_all();
  }
}

void StoreWorker::run(const Run& function, const Taken& taken) {
  KVOutcome outcome = KVOutcome::kFailed;
  try {
    outcome = function(taken.request);
  } catch (...) {  // out of memory; the caller learns it from the outcome
  }
  if (outcome == KVOutcome::kFailed) ++failed_;
  try {
    if (taken.request.on_done) taken.request.on_done(outcome);
  } catch (...) {
    ++callback_errors_;
  }
  taken.ticket->complete(outcome);
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
