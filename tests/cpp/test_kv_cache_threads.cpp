// SPDX-License-Identifier: Apache-2.0
// One manager, many threads: run under the thread sanitizer this shows that nothing races; the
// checks show that calls don't come between each other.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "quire/error.h"
#include "quire/priority_mutex.h"
#include "quire/scheduler.h"

using quire::KVCacheManager;
using quire::KVCacheStats;
using quire::PatientLock;
using quire::PriorityMutex;
using quire::SequenceId;
using Ids = std::vector<int32_t>;

namespace {

Ids random_tokens(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  Ids tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 1000);
  return tokens;
}

// Threads that do something again and again until the object goes.
class Background {
 public:
  template <class F>
  Background(int count, F f) {
    for (int i = 0; i < count; ++i)
      threads_.emplace_back([this, f, i] {
        for (int turn = 0; !stop_; ++turn, ++num_turns_) f(i, turn);
      });
  }
  ~Background() {
    while (num_turns_ == 0) std::this_thread::yield();
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> num_turns_{0};
  std::vector<std::thread> threads_;
};

void run(KVCacheManager& manager, SequenceId seq) {
  const auto lock = manager.lock();  // between the two nobody else may step
  const Ids count{static_cast<int32_t>(manager.num_tokens(seq) - manager.num_computed_tokens(seq))};
  REQUIRE(manager.step({&seq, 1}, count));
  manager.commit({&seq, 1});
}

void check_sums(const KVCacheStats& stats) {
  CHECK(stats.free_blocks + stats.used_blocks + stats.cached_blocks == stats.num_blocks);
  CHECK(stats.used_tokens + stats.waste_tokens == int64_t{stats.used_blocks} * stats.block_size);
  CHECK(stats.used_tokens >= 0);
  CHECK(stats.waste_tokens >= 0);
}

}  // namespace

TEST_CASE("a thread may lock again what it holds; who is patient gives way, others don't") {
  PriorityMutex mutex;
  int value = 0;
  {
    const std::lock_guard outer(mutex), inner(mutex);
    CHECK_FALSE(mutex.is_wanted());
  }
  PatientLock patience(mutex);
  std::thread other([&] {
    const std::lock_guard guard(mutex);
    CHECK_FALSE(mutex.is_wanted());
    value = 1;
  });
  while (!mutex.is_wanted()) std::this_thread::yield();
  {
    const std::lock_guard inner(mutex);  // in the middle of something
    CHECK_FALSE(mutex.is_wanted());
  }
  CHECK(value == 0);
  while (value == 0) patience.give_way_if_wanted();
  other.join();
  CHECK_FALSE(mutex.is_wanted());
}

TEST_CASE("increments under the mutex are not lost, however it is locked") {
  PriorityMutex mutex;
  int64_t sum = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      for (int turn = 0; turn < 2000; ++turn)
        if (i % 2) {
          PatientLock patience(mutex);
          ++sum;
          patience.give_way_if_wanted();
          ++sum;
        } else {
          const std::lock_guard outer(mutex), inner(mutex);
          sum += 2;
        }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(sum == 4 * 2 * 2000);
}

TEST_CASE("readers see whole states while another thread steps, forks and frees") {
  KVCacheManager manager(600, 4, true);
  const Ids prompt = random_tokens(1024, 1);
  const SequenceId kept = manager.create(prompt);
  run(manager, kept);  // held, so that nobody evicts it
  Ids longer = prompt;
  longer.push_back(5);
  {
    const Background readers(2, [&](int, int turn) {
      CHECK(manager.match(longer).num_tokens == 1024);
      if (turn % 8 == 0) check_sums(manager.stats());
      CHECK(manager.num_tokens(kept) == 1024);
    });
    for (uint32_t turn = 0; turn < 60; ++turn) {
      std::vector<SequenceId> seqs;
      for (uint32_t i = 0; i < 8; ++i)
        seqs.push_back(manager.create(random_tokens(40 + i, turn * 8 + i)));
      for (SequenceId seq : seqs) run(manager, seq);
      seqs.push_back(manager.fork(seqs[0]));
      manager.commit(seqs, Ids(seqs.size(), 3));
      for (int i = 0; i < 9; ++i) {  // the loop, over block boundaries
        REQUIRE(manager.step(seqs, Ids(seqs.size(), 1)));
        manager.commit(seqs, Ids(seqs.size(), 7));
      }
      manager.free(seqs);
    }
  }
  manager.validate();
  const KVCacheStats stats = manager.stats();
  CHECK(stats.evicted_blocks > 0);
  CHECK(stats.used_tokens == 1024);  // exact, now that nobody else calls
}

TEST_CASE("a match whose path is evicted meanwhile finds what is left, never what is not there") {
  KVCacheManager manager(256, 4, true);
  const Ids prompt = random_tokens(1001, 2);
  const Background readers(3, [&](int, int) {
    const quire::PrefixMatch found = manager.match(prompt);
    CHECK(found.num_tokens <= 1000);
    CHECK(found.num_idle_blocks <= found.num_tokens / 4);
  });
  for (uint32_t turn = 0; turn < 150; ++turn) {
    const bool again = turn % 2 == 0;  // the others' tokens take all of its blocks
    const SequenceId seq = manager.create(again ? prompt : random_tokens(1001, turn));
    run(manager, seq);
    CHECK((!again || manager.match(prompt).num_tokens == 1000));
    manager.free({&seq, 1});
  }
  manager.validate();
}

TEST_CASE("several threads that each run sequences of their own") {
  KVCacheManager manager(400, 4, true);
  std::atomic<int> num_done{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread)
    threads.emplace_back([&, thread] {
      const Ids prompt = random_tokens(70, thread % 2);  // two threads share
      for (int turn = 0; turn < 40; ++turn) {
        const SequenceId seq = manager.create(prompt, thread < 2 ? quire::Salt{} : "salt");
        run(manager, seq);
        const SequenceId child = manager.fork(seq);
        manager.truncate(child, 30);
        CHECK(manager.tokens(child) == Ids(prompt.begin(), prompt.begin() + 30));
        CHECK(manager.pin(seq) == 68);
        manager.free(std::vector{seq, child});
        CHECK(manager.unpin(prompt, thread < 2 ? quire::Salt{} : "salt") == 68);
        ++num_done;
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(num_done == 160);
  manager.validate();
  CHECK(manager.allocator().num_used() == 0);
}

TEST_CASE("requests come and go from other threads while one schedules") {
  KVCacheManager manager(200, 4, true);
  quire::Scheduler scheduler(manager, {.max_tokens_per_step = 64, .max_seqs = 8});
  constexpr int kClients = 3, kRequests = 25;
  std::atomic<int> num_added{0}, num_finished{0};
  std::vector<std::thread> clients;
  for (int client = 0; client < kClients; ++client)
    clients.emplace_back([&, client] {
      for (int i = 0; i < kRequests; ++i) {
        const Ids prompt = random_tokens(5 + i, client);
        const int32_t id = scheduler.add(prompt, 1 + i % 7);
        CHECK(manager.match(prompt).num_tokens < static_cast<int64_t>(prompt.size()));
        if (i % 10 == 9) scheduler.finish(id);
        CHECK(scheduler.num_running() <= 8);
        ++num_added;
      }
    });
  while (num_added < kClients * kRequests || scheduler.has_work()) {
    const quire::ScheduledBatch* batch = scheduler.schedule();
    if (!batch) continue;
    num_finished += static_cast<int>(scheduler.commit(Ids(batch->sampling.size(), 1)).size());
  }
  for (std::thread& client : clients) client.join();
  scheduler.validate();
  CHECK(num_finished >= kClients * (kRequests - kRequests / 10));
  CHECK(num_finished <= kClients * kRequests);
  CHECK(manager.allocator().num_used() == 0);
}
