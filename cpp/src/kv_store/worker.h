// SPDX-License-Identifier: Apache-2.0
// StoreWorker: the queue of a store's requests and the thread that runs them one by one.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "quire/kv_store.h"

namespace quire {

struct StoreRequest {
  ChainKey key;
  std::span<const std::byte> payload;  // of a put
  std::span<std::byte> out;            // of a get
  KVStore::OnDone on_done;
};

class StoreWorker {
 public:
  // `put` and `get` run on the worker's thread; an exception of theirs is kFailed.
  using Run = std::function<KVOutcome(const StoreRequest&)>;
  StoreWorker(int32_t max_pending, Run put, Run get);
  ~StoreWorker();  // runs what was taken

  // Null: max_pending requests of the kind wait already.
  std::shared_ptr<KVTicket> put(StoreRequest request) { return submit(puts_, std::move(request)); }
  std::shared_ptr<KVTicket> get(StoreRequest request) { return submit(gets_, std::move(request)); }
  void drain();

  // Fills num_pending, not_taken, failed and callback_errors.
  void add_stats(KVStoreStats& stats) const;

 private:
  struct Taken {
    StoreRequest request;
    std::shared_ptr<KVTicket> ticket;
  };
  struct Queue {
    Run run;
    std::deque<Taken> waiting;
  };
  std::shared_ptr<KVTicket> submit(Queue& queue, StoreRequest request);
  void work();
  void run(const Run& function, const Taken& taken);

  const size_t max_pending_;
  Queue puts_, gets_;
  mutable std::mutex mutex_;
  std::condition_variable has_work_, is_idle_;
  bool stops_ = false;
  int64_t num_pending_ = 0;
  int64_t not_taken_ = 0;
  std::atomic<int64_t> failed_{0}, callback_errors_{0};
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace quire
