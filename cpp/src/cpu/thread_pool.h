// SPDX-License-Identifier: Apache-2.0
// The threads that CPU kernels run on: created at first use, asleep when there is nothing to do.
#pragma once

#include <cstdint>

namespace quire::cpu {

// The body of a loop, by reference: unlike std::function it never allocates.
class LoopBody {
 public:
  template <class F>
  LoopBody(const F& f)  // NOLINT: a conversion
      : f_(&f), call_([](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }) {}
  void operator()(int64_t i) const { call_(f_, i); }

 private:
  const void* f_;
  void (*call_)(const void*, int64_t);
};

// Calls f(0) ... f(count - 1), each once, in any order, on up to num_threads() threads, the caller
// among them; returns when all have returned. If calls throw, the rest is skipped and the first
// exception is rethrown here. Safe from any thread: while another caller has the pool, or inside
// f, the work is done by the caller alone. After fork() the child starts its own threads.
void parallel_for(int64_t count, LoopBody f);

}  // namespace quire::cpu
