// SPDX-License-Identifier: Apache-2.0
// PriorityMutex: for a structure that some calls must reach at once and others at leisure.
//
// lock() is for the former. Who came by lock_patiently() does a bounded piece of work, asks
// is_wanted(), and if so calls give_way() before the next piece; so lock() waits for a piece at
// most, whatever the whole takes. A thread may lock again what it holds.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace quire {

class PriorityMutex {
 public:
  void lock() {
    if (is_mine()) return hold_again();
    if (!mutex_.try_lock()) wait();
    hold(false);
  }
  void lock_patiently() {
    if (is_mine()) return hold_again();
    while (num_waiting_.load(std::memory_order_relaxed) > 0) std::this_thread::yield();
    mutex_.lock();
    hold(true);
  }
  void unlock() {
    if (--depth_ > 0) return;
    owner_.store({}, std::memory_order_relaxed);
    mutex_.unlock();
  }

  // Of the thread that holds it: whether it may give way, and somebody waits in lock().
  bool is_wanted() const {
    return num_waiting_.load(std::memory_order_relaxed) > 0 && is_patient_ && depth_ == 1;
  }
  void give_way() {
    unlock();
    lock_patiently();
  }

 private:
  // Only this thread stores its own id, so what it reads of others does not matter.
  bool is_mine() const {
    return owner_.load(std::memory_order_relaxed) == std::this_thread::get_id();
  }
  void hold(bool patiently) {
    owner_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    depth_ = 1;
    is_patient_ = patiently;
  }
  void hold_again() { ++depth_; }
  void wait();

  std::mutex mutex_;
  std::atomic<std::thread::id> owner_{};
  std::atomic<int32_t> num_waiting_{0};  // in lock()
  int32_t depth_ = 0;                    // of the owner's locks
  bool is_patient_ = false;
};

// Holds a PriorityMutex as lock_patiently() does.
class PatientLock {
 public:
  explicit PatientLock(PriorityMutex& mutex) : mutex_(mutex) { mutex_.lock_patiently(); }
  PatientLock(const PatientLock&) = delete;
  ~PatientLock() { mutex_.unlock(); }

  void give_way_if_wanted() {
    if (mutex_.is_wanted()) mutex_.give_way();
  }

 private:
  PriorityMutex& mutex_;
};

}  // namespace quire
