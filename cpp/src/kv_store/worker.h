// SPDX-License-Identifier: Apache-2.0
// StoreWorker: the queues of a store's requests and the threads that run them.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "quire/kv_store.h"

namespace quire {

struct StoreRequest {
  ChainKey key;
  std::span<const std::byte> payload;  // of a put
  std::span<std::byte> out;            // of a get
  KVStore::OnDone on_done;
};

// What a store does with its requests. An exception is kFailed for all that were given.
struct StoreWork {
  std::function<KVOutcome(const StoreRequest&)> get;
  // Fills an outcome for each of up to max_batch puts.
  std::function<void(std::span<const StoreRequest>, std::span<KVOutcome>)> put;
  size_t max_batch = 1;
  bool gets_have_a_thread = false;  // else one thread runs all, and gets come first
};

class StoreWorker {
 public:
  StoreWorker(int32_t max_pending, StoreWork work);
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
  using Queue = std::deque<Taken>;
  struct Batch {
    std::vector<StoreRequest> requests;
    std::vector<std::shared_ptr<KVTicket>> tickets;
    bool is_puts = false;
  };
  std::shared_ptr<KVTicket> submit(Queue& queue, StoreRequest request);
  void stop();
  void serve(bool gets, bool puts);
  Batch take(bool gets, bool puts);
  void run(const Batch& batch);

  const size_t max_pending_;
  const StoreWork work_;
  Queue puts_, gets_;
  mutable std::mutex mutex_;
  std::condition_variable has_work_, is_idle_;
  bool stops_ = false;
  int64_t num_pending_ = 0;
  int64_t not_taken_ = 0;
  std::atomic<int64_t> failed_{0}, callback_errors_{0};
  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace quire
