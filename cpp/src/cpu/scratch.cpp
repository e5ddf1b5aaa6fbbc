// SPDX-License-Identifier: Apache-2.0
// One block of memory a thread, freed with the thread.
#include "cpu/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace quire::cpu {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = 2 << 20;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

void* allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage / 2 ? kHugePage : kCacheLine;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);  // a hint: may be refused
#endif
  return memory;
}

}  // namespace

float* thread_scratch(size_t num_floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t size = 0;
  if (num_floats > size) {
    memory.reset();
    size = 0;
    const size_t wanted = num_floats + num_floats / 4;
    memory.reset(static_cast<float*>(allocate(wanted * sizeof(float))));
    size = wanted;
  }
  return memory.get();
}

}  // namespace quire::cpu
