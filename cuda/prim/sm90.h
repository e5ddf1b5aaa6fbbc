// SPDX-License-Identifier: Apache-2.0
// The primitives that compute capability 9.0a has besides those of 8.0: mbarriers, bulk copies of
// boxes of tensors, matrix products of warpgroups (128 threads, four warps that begin with a
// multiple of four), registers that move between warpgroups.
//
// Bulk copies and products reach memory through the async proxy: what threads have stored is seen
// by them after fence_proxy_async() and a barrier.
#pragma once

#include <cstdint>

#include "prim/sm80.h"

namespace quire::device {

// --- mbarriers
// ------------------------------------------------------------------------------------- Eight bytes
// of shared memory. A phase is complete when `count` arrivals and all announced bytes have come;
// then the next begins. Phases have parity 0, 1, 0, ...

QUIRE_DEVICE void mbarrier_init(SharedAddress barrier, int count, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier.value), "r"(count)
               : "memory");
#else
  emulator::init_mbarrier(barrier.value, static_cast<uint32_t>(count), site);
#endif
}

// The mbarriers that this thread has initialised are seen by bulk copies.
QUIRE_DEVICE void fence_mbarrier_init() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulator::Block::current().fence_mbarriers();
#endif
}

QUIRE_DEVICE void mbarrier_arrive(SharedAddress barrier, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier.value) : "memory");
#else
  emulator::arrive(barrier.value, 0, site);
#endif
}

// Arrives, and announces `bytes` bytes of copies to come.
QUIRE_DEVICE void mbarrier_arrive_expect(SharedAddress barrier, int bytes,
                                         Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier.value),
               "r"(bytes)
               : "memory");
#else
  emulator::arrive(barrier.value, static_cast<uint32_t>(bytes), site);
#endif
}

// Until the phase of parity `parity` is complete. That of parity 1 is so from the beginning.
QUIRE_DEVICE void mbarrier_wait(SharedAddress barrier, uint32_t parity, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .pred %%is_complete;\n"
      "quire_wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 %%is_complete, [%0], %1;\n"
      "@%%is_complete bra quire_done;\n"
      "bra quire_wait;\n"
      "quire_done:\n"
      "}" ::"r"(barrier.value),
      "r"(parity)
      : "memory");
#else
  emulator::wait_mbarrier(barrier.value, parity, site);
#endif
}

// --- Order
// -----------------------------------------------------------------------------------------

// What this thread has stored in shared memory, or copied there, is seen by the async proxy.
QUIRE_DEVICE void fence_proxy_async() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::Block::current().fence_proxy();
#endif
}

// A barrier of `kThreads` threads. Of the numbers 0 to 15, 0 is sync_block()'s.
template <int kThreads>
QUIRE_DEVICE void sync_threads(int number, Site site = Site::here()) {
  static_assert(kThreads % kWarpSize == 0);
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
#else
  emulator::Block::current().sync_named(number, kThreads, true, site);
#endif
}

// Arrives there, and does not wait: for those who do.
template <int kThreads>
QUIRE_DEVICE void arrive_threads(int number, Site site = Site::here()) {
  static_assert(kThreads % kWarpSize == 0);
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
#else
  emulator::Block::current().sync_named(number, kThreads, false, site);
#endif
}

// Every thread of a warpgroup gives registers back, or takes them once they are there. A multiple
// of 8; all warpgroups together have those of the launch.
template <int kRegisters>
QUIRE_DEVICE void decrease_registers(Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::set_registers(kRegisters, false, site);
#endif
}

template <int kRegisters>
QUIRE_DEVICE void increase_registers(Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::set_registers(kRegisters, true, site);
#endif
}

// --- Bulk copies
// -----------------------------------------------------------------------------------

// Brings a box of a tensor of rank 4 to shared memory, swizzled over 128 bytes, in the background;
// its bytes count towards `barrier`. Coordinates in elements, the contiguous dimension first. What
// is outside of the tensor becomes zero.
QUIRE_DEVICE void copy_box(SharedAddress destination, const TensorMap* map, SharedAddress barrier,
                           int c0, int c1, int c2, int c3, Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination.value),
      "l"(map), "r"(barrier.value), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#else
  emulator::copy_box(destination.value, map, barrier.value, {c0, c1, c2, c3}, site);
#endif
}

// --- Products of warpgroups
// --------------------------------------------------------------------------

// Names a matrix of 16-bit elements in shared memory, in rows of 128 bytes (64 elements), swizzled.
struct MatrixDescriptor {
  uint64_t bits;
};

// `stride`: bytes from eight rows to the next eight. `leading`: where the elements of a row are
// columns of the product (Major::kN), bytes from 64 columns to the next 64; else unused.
QUIRE_DEVICE MatrixDescriptor describe_matrix(SharedAddress start, uint32_t leading,
                                              uint32_t stride) {
  constexpr uint64_t kSwizzled128 = uint64_t{1} << 62;
  return {(start.value & 0x3FFFF) >> 4 | uint64_t{leading >> 4} << 16 |
          uint64_t{stride >> 4} << 32 | kSwizzled128};
}

// Along which dimension of the product the elements of the right operand's rows lie.
enum class Major { kK, kN };

// Registers that this thread has written are seen by products issued after.
QUIRE_DEVICE void wgmma_fence(Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::fence_products(site);
#endif
}

// The products since the last commit become a group.
QUIRE_DEVICE void wgmma_commit(Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::commit_products(site);
#endif
}

// Waits for all groups but the latest kGroups. Until then their sums may not be touched.
template <int kGroups>
QUIRE_DEVICE void wgmma_wait(Site site = Site::here()) {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#else
  emulator::wait_products(kGroups, site);
#endif
}

#if defined(__CUDACC__)
// Lists of operands.
#define QUIRE_SUMS(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define QUIRE_SUMS_8(n)                                                                      \
  QUIRE_SUMS(n), QUIRE_SUMS(n + 1), QUIRE_SUMS(n + 2), QUIRE_SUMS(n + 3), QUIRE_SUMS(n + 4), \
      QUIRE_SUMS(n + 5), QUIRE_SUMS(n + 6), QUIRE_SUMS(n + 7)
#define QUIRE_REGISTERS_16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define QUIRE_REGISTERS_32                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define QUIRE_REGISTERS_64                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "  \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
  "%62, %63}"
#define QUIRE_REGISTERS_128                                                        \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "   \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "    \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "    \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "    \
  "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, "    \
  "%77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "    \
  "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, "   \
  "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define QUIRE_WGMMA_32_SS(type)                                                          \
  asm volatile(                                                                          \
      "{\n"                                                                              \
      ".reg .pred %%accumulates;\n"                                                      \
      "setp.ne.b32 %%accumulates, %18, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " " QUIRE_REGISTERS_16 \
      ", %16, %17, %%accumulates, 1, 1, 0, %19;\n"                                       \
      "}"                                                                                \
      : QUIRE_SUMS(0), QUIRE_SUMS(1), QUIRE_SUMS(2), QUIRE_SUMS(3)                       \
      : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(accumulate)), "n"(kTransposed))
#define QUIRE_WGMMA_64_SS(type)                                                          \
  asm volatile(                                                                          \
      "{\n"                                                                              \
      ".reg .pred %%accumulates;\n"                                                      \
      "setp.ne.b32 %%accumulates, %34, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " QUIRE_REGISTERS_32 \
      ", %32, %33, %%accumulates, 1, 1, 0, %35;\n"                                       \
      "}"                                                                                \
      : QUIRE_SUMS_8(0)                                                                  \
      : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(accumulate)), "n"(kTransposed))
#define QUIRE_WGMMA_64_RS(type)                                                          \
  asm volatile(                                                                          \
      "{\n"                                                                              \
      ".reg .pred %%accumulates;\n"                                                      \
      "setp.ne.b32 %%accumulates, %37, 0;\n"                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " QUIRE_REGISTERS_32 \
      ", {%32, %33, %34, %35}, %36, %%accumulates, 1, 1, %38;\n"                         \
      "}"                                                                                \
      : QUIRE_SUMS_8(0)                                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits),                         \
        "r"(static_cast<int>(accumulate)), "n"(kTransposed))
#define QUIRE_WGMMA_128_SS(type)                                                          \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred %%accumulates;\n"                                                       \
      "setp.ne.b32 %%accumulates, %66, 0;\n"                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " QUIRE_REGISTERS_64 \
      ", %64, %65, %%accumulates, 1, 1, 0, %67;\n"                                        \
      "}"                                                                                 \
      : QUIRE_SUMS_8(0), QUIRE_SUMS_8(8)                                                  \
      : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(accumulate)), "n"(kTransposed))
#define QUIRE_WGMMA_128_RS(type)                                                          \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred %%accumulates;\n"                                                       \
      "setp.ne.b32 %%accumulates, %69, 0;\n"                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " QUIRE_REGISTERS_64 \
      ", {%64, %65, %66, %67}, %68, %%accumulates, 1, 1, %70;\n"                          \
      "}"                                                                                 \
      : QUIRE_SUMS_8(0), QUIRE_SUMS_8(8)                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits),                          \
        "r"(static_cast<int>(accumulate)), "n"(kTransposed))
#define QUIRE_WGMMA_256_RS(type)                                                           \
  asm volatile(                                                                            \
      "{\n"                                                                                \
      ".reg .pred %%accumulates;\n"                                                        \
      "setp.ne.b32 %%accumulates, %133, 0;\n"                                              \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " " QUIRE_REGISTERS_128 \
      ", {%128, %129, %130, %131}, %132, %%accumulates, 1, 1, %134;\n"                     \
      "}"                                                                                  \
      : QUIRE_SUMS_8(0), QUIRE_SUMS_8(8), QUIRE_SUMS_8(16), QUIRE_SUMS_8(24)               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits),                           \
        "r"(static_cast<int>(accumulate)), "n"(kTransposed))
#endif

// d[64][8 kN8] = (accumulate ? d : 0) + a[64][16] b[16][8 kN8], by a warpgroup and in the
// background. Thread 32w + 4g + t holds of d rows 16w + g, 16w + g + 8 at columns 8n + 2t.. in
// d[n], like mma(). `a` is in rows of k, `b` as kMajor says.
template <class Type, Major kMajor, int kN8>
QUIRE_DEVICE void wgmma(float (&d)[kN8][4], MatrixDescriptor a, MatrixDescriptor b, bool accumulate,
                        Site site = Site::here()) {
  static_assert(kN8 == 4 || kN8 == 8 || kN8 == 16);
#if defined(__CUDACC__)
  constexpr int kTransposed = kMajor == Major::kN;
  if constexpr (kN8 == 4) {
    if constexpr (Type::is_bfloat16)
      QUIRE_WGMMA_32_SS("bf16");
    else
      QUIRE_WGMMA_32_SS("f16");
  } else if constexpr (kN8 == 8) {
    if constexpr (Type::is_bfloat16)
      QUIRE_WGMMA_64_SS("bf16");
    else
      QUIRE_WGMMA_64_SS("f16");
  } else {
    if constexpr (Type::is_bfloat16)
      QUIRE_WGMMA_128_SS("bf16");
    else
      QUIRE_WGMMA_128_SS("f16");
  }
#else
  emulator::multiply({&d[0][0], {}, a.bits, b.bits, accumulate},
                     {8 * kN8, Type::is_bfloat16, false, kMajor == Major::kN}, false, site);
#endif
}

// The same with `a` in registers, laid out like mma()'s: of each warp its own 16 rows.
template <class Type, Major kMajor, int kN8>
QUIRE_DEVICE void wgmma(float (&d)[kN8][4], const uint32_t (&a)[4], MatrixDescriptor b,
                        bool accumulate, Site site = Site::here()) {
  static_assert(kN8 == 8 || kN8 == 16 || kN8 == 32);
#if defined(__CUDACC__)
  constexpr int kTransposed = kMajor == Major::kN;
  if constexpr (kN8 == 8) {
    if constexpr (Type::is_bfloat16)
      QUIRE_WGMMA_64_RS("bf16");
    else
      QUIRE_WGMMA_64_RS("f16");
  } else if constexpr (kN8 == 16) {
    if constexpr (Type::is_bfloat16)
      QUIRE_WGMMA_128_RS("bf16");
    else
      QUIRE_WGMMA_128_RS("f16");
  } else {
    if constexpr (Type::is_bfloat16)
      QUIRE_WGMMA_256_RS("bf16");
    else
      QUIRE_WGMMA_256_RS("f16");
  }
#else
  emulator::multiply({&d[0][0], {a[0], a[1], a[2], a[3]}, 0, b.bits, accumulate},
                     {8 * kN8, Type::is_bfloat16, true, kMajor == Major::kN}, false, site);
#endif
}

}  // namespace quire::device
