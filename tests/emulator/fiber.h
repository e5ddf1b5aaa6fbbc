// SPDX-License-Identifier: Apache-2.0
// Fiber: one flow of control with a stack of its own, switched to by hand. A CUDA thread is one.
//
// On x86-64 a switch saves the six registers that the ABI calls callee-saved; elsewhere it is
// ucontext. AddressSanitizer is told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Pushes the caller's registers, parks its stack pointer in *save, takes up the one in `load`.
extern "C" void quire_emulator_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.weak quire_emulator_switch
.type quire_emulator_switch,@function
quire_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size quire_emulator_switch,.-quire_emulator_switch
)");
#endif

namespace quire::emulator {

class Fiber {
 public:
  // Default: the flow that is running already; it becomes a fiber by switching away.
  Fiber() = default;

  // Makes the next switch_to() call `entry`, which must never return.
  void prepare(char* stack, size_t size, void (*entry)()) {
    stack_ = stack;
    stack_size_ = size;
#if defined(__x86_64__)
    // The ABI wants rsp + 8 to be a multiple of 16 at a function's first instruction.
    void** top = reinterpret_cast<void**>(stack + size) - 3;
    *top = nullptr;  // return address of entry
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // `last`: this fiber will not be switched to again.
  void switch_to(Fiber& next, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, next.stack_, next.stack_size_);
#endif
    (void)last;
#if defined(__x86_64__)
    quire_emulator_switch(&stack_pointer_, next.stack_pointer_);
#else
    swapcontext(&context_, &next.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // To be called first in `entry`: tells AddressSanitizer which stack `from` runs on.
  static void entered([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!from.stack_) {
      from.stack_ = static_cast<const char*>(bottom);
      from.stack_size_ = size;
    }
#endif
  }

 private:
  static constexpr int kSavedRegisters = 6;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  const char* stack_ = nullptr;
  size_t stack_size_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
#endif
};

// Stacks of `count` fibers in one mapping, touched only as far as they are used. Below each lies
// a page that must not be touched, so an overflow ends the process instead of a neighbour.
class FiberStacks {
 public:
  static constexpr size_t kStackSize = 256 << 10;

  explicit FiberStacks(int count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    guard_ = page;
    void* mapping = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
    mapping_ = static_cast<char*>(mapping);
    for (int i = 0; i < count; ++i)
      mprotect(mapping_ + i * (guard_ + kStackSize), guard_, PROT_NONE);
  }
  FiberStacks(const FiberStacks&) = delete;
  ~FiberStacks() { munmap(mapping_, bytes()); }

  char* stack(int index) { return mapping_ + index * (guard_ + kStackSize) + guard_; }

 private:
  size_t bytes() const { return count_ * (guard_ + kStackSize); }

  int count_;
  size_t guard_ = 0;
  char* mapping_ = nullptr;
};

}  // namespace quire::emulator
