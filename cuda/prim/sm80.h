// SPDX-License-Identifier: Apache-2.0
// The primitives of compute capability 8.0, which every later architecture runs too. Kernels are
// written in these alone. On the device each is one PTX statement; on the host it asks the
// emulator. They follow the names of PTX, whose manual defines them.
#pragma once

#include <cstdint>

#include "prim/types.h"

namespace quire::device {

// --- Who am I ------------------------------------------------------------------------------------

#if defined(__CUDACC__)
// Tiles that are swizzled over 128 bytes begin at multiples of eight of their rows.
extern __shared__ __align__(1024) unsigned char shared_memory[];
#endif

QUIRE_DEVICE int thread_index() {
#if defined(__CUDACC__)
  return static_cast<int>(threadIdx.x);
#else
  return emulator::Block::current().thread();
#endif
}

// The same, but the compiler can't tell: what is computed from it is computed where it is used, not
// kept in registers through a loop. The kernels have more addresses than registers.
QUIRE_DEVICE int fresh_thread_index() {
#if defined(__CUDACC__)
  int index = thread_index();
  asm volatile("" : "+r"(index));
  return index;
#else
  return thread_index();
#endif
}

QUIRE_DEVICE int block_index() {
#if defined(__CUDACC__)
  return static_cast<int>(blockIdx.x);
#else
  return emulator::Block::current().index();
#endif
}

QUIRE_DEVICE int num_blocks() {
#if defined(__CUDACC__)
  return static_cast<int>(gridDim.x);
#else
  return emulator::Block::current().grid_size();
#endif
}

// Where the block's dynamic shared memory begins.
QUIRE_DEVICE SharedAddress shared_base() {
#if defined(__CUDACC__)
  return {static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory))};
#else
  return {0};
#endif
}

// --- Order ---------------------------------------------------------------------------------------

QUIRE_DEVICE void sync_block(Site site = Site::here()) {
#if defined(__CUDACC__)
  __syncthreads();
#else
  emulator::Block::current().sync_block(site);
#endif
}

QUIRE_DEVICE void sync_warp(Site site = Site::here()) {
#if defined(__CUDACC__)
  __syncwarp();
#else
  emulator::Block::current().sync_warp(site);
#endif
}

// What this thread has stored is seen by whoever sees what it does next, in any block.
QUIRE_DEVICE void fence_gpu() {
#if defined(__CUDACC__)
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  emulator::Block::current().fence_global();
#endif
}

// Counts 0, 1, ..., last, 0, ... and returns the count before: it resets itself.
QUIRE_DEVICE uint32_t atomic_increment(uint32_t* counter, uint32_t last, Site site = Site::here()) {
#if defined(__CUDACC__)
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
#else
  return emulator::atomic_increment(counter, last, true, site);
#endif
}

// The same, where what was stored before is nobody's business.
QUIRE_DEVICE uint32_t take_ticket(uint32_t* counter, uint32_t last, Site site = Site::here()) {
#if defined(__CUDACC__)
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
#else
  return emulator::atomic_increment(counter, last, false, site);
#endif
}

// --- Lanes of a warp -----------------------------------------------------------------------------

// The value of the lane whose index differs in the bits of `lane_mask`.
QUIRE_DEVICE float shuffle_xor(float value, int lane_mask, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(~0u, value, lane_mask);
#else
  return std::bit_cast<float>(
      emulator::shuffle(std::bit_cast<uint32_t>(value), lane_mask, true, site));
#endif
}

// The value of lane `lane`.
QUIRE_DEVICE int shuffle(int value, int lane, Site site = Site::here()) {
#if defined(__CUDACC__)
  return __shfl_sync(~0u, value, lane);
#else
  return static_cast<int>(emulator::shuffle(static_cast<uint32_t>(value), lane, false, site));
#endif
}

QUIRE_DEVICE int64_t shuffle(int64_t value, int lane, Site site = Site::here()) {
  const int low = shuffle(static_cast<int>(value), lane, site);
  const int high = shuffle(static_cast<int>(value >> 32), lane, site);
  return int64_t{high} << 32 | static_cast<uint32_t>(low);
}

// --- Memory --------------------------------------------------------------------------------------
// T has 2, 4, 8 or 16 bytes (global loads: or 1) and its address is a multiple of that.

template <class T>
QUIRE_DEVICE T ld_shared(SharedAddress address, Site site = Site::here()) {
#if defined(__CUDACC__)
  union {
    T value;
    uint16_t half;
    uint32_t words[sizeof(T) <= 4 ? 1 : sizeof(T) / 4];
  } u;
  if constexpr (sizeof(T) == 2)
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(u.half) : "r"(address.value) : "memory");
  else if constexpr (sizeof(T) == 4)
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(u.words[0]) : "r"(address.value) : "memory");
  else if constexpr (sizeof(T) == 8)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(u.words[0]), "=r"(u.words[1])
                 : "r"(address.value)
                 : "memory");
  else
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3])
                 : "r"(address.value)
                 : "memory");
  return u.value;
#else
  return emulator::load_shared<T>(address.value, site);
#endif
}

template <class T>
QUIRE_DEVICE void st_shared(SharedAddress address, T value, Site site = Site::here()) {
#if defined(__CUDACC__)
  union {
    T value;
    uint16_t half;
    uint32_t words[sizeof(T) <= 4 ? 1 : sizeof(T) / 4];
  } u{value};
  if constexpr (sizeof(T) == 2)
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address.value), "h"(u.half) : "memory");
  else if constexpr (sizeof(T) == 4)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address.value), "r"(u.words[0]) : "memory");
  else if constexpr (sizeof(T) == 8)
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address.value), "r"(u.words[0]),
                 "r"(u.words[1])
                 : "memory");
  else
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address.value), "r"(u.words[0]),
                 "r"(u.words[1]), "r"(u.words[2]), "r"(u.words[3])
                 : "memory");
#else
  emulator::store_shared(address.value, value, site);
#endif
}

template <class T>
QUIRE_DEVICE T ld_global(const T* pointer, Site site = Site::here()) {
#if defined(__CUDACC__)
  return *pointer;
#else
  return emulator::load_global(pointer, site);
#endif
}

template <class T>
QUIRE_DEVICE void st_global(T* pointer, T value, Site site = Site::here()) {
#if defined(__CUDACC__)
  *pointer = value;
#else
  emulator::store_global(pointer, value, site);
#endif
}

// Copies kBytes (4, 8 or 16) from global to shared memory in the background: `valid` bytes are
// read, the rest becomes zero.
template <int kBytes>
QUIRE_DEVICE void cp_async(SharedAddress destination, const void* source, int valid,
                           Site site = Site::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(__CUDACC__)
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination.value),
                 "l"(source), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination.value),
                 "l"(source), "n"(kBytes), "r"(valid)
                 : "memory");
#else
  emulator::copy_async(destination.value, source, kBytes, static_cast<uint32_t>(valid), site);
#endif
}

// The copies since the last commit become a group.
QUIRE_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::Block::current().commit_copies();
#endif
}

// Waits for all groups of this thread but the latest kGroups.
template <int kGroups>
QUIRE_DEVICE void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  emulator::Block::current().wait_copies(kGroups);
#endif
}

// --- Matrices ------------------------------------------------------------------------------------

enum class Transposed : bool { kNo, kYes };

// kCount (1, 2 or 4) 8 x 8 matrices of 16-bit elements. Lane 8j + i gives the address of row i of
// matrix j; registers[j] of lane 4g + t is elements 2t and 2t + 1 of row g, or of column g.
template <Transposed kTransposed, int kCount>
QUIRE_DEVICE void ldmatrix(uint32_t (&registers)[kCount], SharedAddress row,
                           Site site = Site::here()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#if defined(__CUDACC__)
#define QUIRE_LDMATRIX(suffix, outputs, operand, ...)                                            \
  if constexpr (kTransposed == Transposed::kYes)                                                 \
    asm volatile("ldmatrix.sync.aligned.m8n8." suffix ".trans.shared.b16 " outputs ", [" operand \
                 "];"                                                                            \
                 : __VA_ARGS__                                                                   \
                 : "r"(row.value)                                                                \
                 : "memory");                                                                    \
  else                                                                                           \
    asm volatile("ldmatrix.sync.aligned.m8n8." suffix ".shared.b16 " outputs ", [" operand "];"  \
                 : __VA_ARGS__                                                                   \
                 : "r"(row.value)                                                                \
                 : "memory")
  if constexpr (kCount == 1) {
    QUIRE_LDMATRIX("x1", "{%0}", "%1", "=r"(registers[0]));
  } else if constexpr (kCount == 2) {
    QUIRE_LDMATRIX("x2", "{%0, %1}", "%2", "=r"(registers[0]), "=r"(registers[1]));
  } else {
    QUIRE_LDMATRIX("x4", "{%0, %1, %2, %3}", "%4", "=r"(registers[0]), "=r"(registers[1]),
                   "=r"(registers[2]), "=r"(registers[3]));
  }
#undef QUIRE_LDMATRIX
#else
  emulator::ldmatrix(registers, kCount, kTransposed == Transposed::kYes, row.value, site);
#endif
}

// c[16][8] += a[16][16] b[16][8], 16-bit inputs, float32 sums. Lane 4g + t holds
//   a: rows g, g + 8 at columns 2t.., then the same rows at columns 2t + 8..
//   b: column g at rows 2t.. and 2t + 8..;   c: row g at columns 2t.., then row g + 8.
template <class Type>
QUIRE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                      Site site = Site::here()) {
#if defined(__CUDACC__)
#define QUIRE_MMA(type)                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (Type::is_bfloat16)
    QUIRE_MMA("bf16");
  else
    QUIRE_MMA("f16");
#undef QUIRE_MMA
#else
  emulator::mma<Type>(c, a, b0, b1, site);
#endif
}

}  // namespace quire::device
