// SPDX-License-Identifier: Apache-2.0
#include "quire/priority_mutex.h"

namespace quire {
namespace {

// Half a microsecond, as long as a piece of work. Then the holder may be waiting for this very
// core, or be asleep.
constexpr int kMaxSpins = 30;
constexpr int kMaxYields = 10;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // as long as a pause; "yield" is nothing on most cores
#endif
}

}  // namespace

void PriorityMutex::wait() {
  num_waiting_.fetch_add(1, std::memory_order_relaxed);
  bool is_locked = false;
  for (int i = 0; i < kMaxSpins + kMaxYields && !is_locked; ++i) {
    if (i < kMaxSpins)
      pause();
    else
      std::this_thread::yield();
    is_locked = mutex_.try_lock();
  }
  if (!is_locked) mutex_.lock();
  num_waiting_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace quire
