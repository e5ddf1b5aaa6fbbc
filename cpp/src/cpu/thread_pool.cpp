// SPDX-License-Identifier: Apache-2.0
// Workers draw indices of one job at a time; the caller draws too and then waits for the others.
// A job is published under a lock that is held for a few instructions only.
#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cpu/available_cpus.h"
#include "quire/backend.h"
#include "quire/error.h"

namespace quire::cpu {
namespace {

constexpr int kMaxThreads = 1024;

// One parallel_for: whoever takes part draws indices until none is left.
class Job {
 public:
  Job(int64_t count, LoopBody f) : count_(count), f_(f) {}

  void take_part() {
    try {
      for (int64_t i = next_++; i < count_; i = next_++) f_(i);
    } catch (...) {
      next_ = count_;
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t count_;
  const LoopBody f_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Short waits are spun out, as layers follow each other within microseconds; longer ones sleep.
template <class Condition>
bool spin_until(Condition condition) {
  constexpr int kSpins = 2000;
  for (int i = 0; i < kSpins; ++i) {
    if (condition()) return true;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return false;
}

class Workers {
 public:
  explicit Workers(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Workers() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      ++generation_;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int count() const { return static_cast<int>(threads_.size()); }

  void run(Job& job) {
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      ++generation_;
    }
    wake_.notify_all();
    job.take_part();
    std::unique_lock lock(mutex_);
    job_ = nullptr;  // nobody joins from here on
    if (num_busy_ > 0) {
      lock.unlock();
      spin_until([this] { return num_busy_ == 0; });
      lock.lock();
      done_.wait(lock, [this] { return num_busy_ == 0; });
    }
  }

 private:
  void work() {
    int64_t seen = 0;
    while (true) {
      spin_until([&] { return generation_ != seen; });
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (stop_) return;
      if (!job_) continue;
      Job& job = *job_;
      ++num_busy_;
      lock.unlock();
      job.take_part();
      lock.lock();
      if (--num_busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> generation_{0};  // of jobs; written under the mutex
  std::atomic<int> num_busy_{0};        // likewise
  Job* job_ = nullptr;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

int default_num_threads() {
  const char* text = std::getenv("QUIRE_NUM_THREADS");
  if (!text || !*text) return std::min(available_cpus(), kMaxThreads);
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  QUIRE_CHECK_ARG(*end == '\0' && count >= 1 && count <= kMaxThreads,
                  "QUIRE_NUM_THREADS: expected 1 to ", kMaxThreads, ", got ", text);
  return static_cast<int>(count);
}

struct Pool {
  explicit Pool(int count) : num_threads(count) {}

  std::mutex mutex;  // held by the caller that has the workers
  std::atomic<int> num_threads;
  std::unique_ptr<Workers> workers;
};

std::atomic<Pool*> current_pool{nullptr};

// Threads do not survive a fork, and one of them may have held a lock: the child leaves the pool
// behind and has a new one.
void renew_pool() { current_pool = new Pool(current_pool.load()->num_threads); }

// Never destroyed: threads may still be asleep in it when the process ends.
Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    current_pool = new Pool(default_num_threads());
    pthread_atfork(nullptr, nullptr, renew_pool);
  });
  return *current_pool;
}

thread_local bool is_inside = false;  // a parallel_for of this thread has the pool

}  // namespace

void parallel_for(int64_t count, LoopBody f) {
  Pool& p = pool();
  const int num_threads = p.num_threads;
  std::unique_lock lock(p.mutex, std::defer_lock);
  if (count <= 1 || num_threads == 1 || is_inside || !lock.try_lock()) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  if (!p.workers || p.workers->count() != num_threads - 1) {
    p.workers.reset();
    p.workers = std::make_unique<Workers>(num_threads - 1);
  }
  Job job(count, f);
  is_inside = true;
  p.workers->run(job);
  is_inside = false;
  job.rethrow();
}

}  // namespace quire::cpu

namespace quire {

int num_threads() { return cpu::pool().num_threads; }

void set_num_threads(int count) {
  QUIRE_CHECK_ARG(count >= 1 && count <= cpu::kMaxThreads,
                  "set_num_threads: count: expected at least 1 and at most ", cpu::kMaxThreads,
                  ", got ", count);
  cpu::pool().num_threads = count;
}

}  // namespace quire
