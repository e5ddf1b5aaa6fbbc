// SPDX-License-Identifier: Apache-2.0
// Golden vectors: each primitive of cuda/prim over fixed inputs, one warp a case. record.cu writes
// what a GPU answers; test_golden.cpp asks the emulator the same. Built for both sides.
#pragma once

#include "prim/math.h"
#include "prim/sm80.h"

namespace quire::device::golden {

inline constexpr int kWords = 8;  // of input a lane, and at most of output
inline constexpr int kCases = 8;
inline constexpr int kSharedBytes = 1024;

// How the words of an input are drawn: see inputs.h.
enum class Input { kFloats, kFloat16s, kBFloat16s, kBits };

QUIRE_DEVICE float as_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } word = {bits};
  return word.value;
}

QUIRE_DEVICE uint32_t as_bits(float value) {
  union {
    float value;
    uint32_t bits;
  } word = {value};
  return word.bits;
}

QUIRE_DEVICE int lane() { return thread_index() % kWarpSize; }
QUIRE_DEVICE SharedAddress own_row() { return shared_base() + static_cast<uint32_t>(16 * lane()); }

// `in` and `out` are the lane's own words.
struct Fma {
  static constexpr Input kInput = Input::kFloats;
  static constexpr int kOut = 1;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = as_bits(fma(as_float(in[0]), as_float(in[1]), as_float(in[2])));
  }
};

struct Mul {
  static constexpr Input kInput = Input::kFloats;
  static constexpr int kOut = 1;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = as_bits(mul(as_float(in[0]), as_float(in[1])));
  }
};

struct Max {
  static constexpr Input kInput = Input::kFloats;
  static constexpr int kOut = 1;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = as_bits(max(as_float(in[0]), as_float(in[1])));
  }
};

struct Exp2 {
  static constexpr Input kInput = Input::kFloats;
  static constexpr int kOut = 1;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = as_bits(exp2(as_float(in[0])));
  }
};

struct Log2 {
  static constexpr Input kInput = Input::kFloats;
  static constexpr int kOut = 1;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = as_bits(log2(as_float(in[0] & 0x7FFFFFFFu)));
  }
};

struct Rcp {
  static constexpr Input kInput = Input::kFloats;
  static constexpr int kOut = 1;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = as_bits(rcp(as_float(in[0])));
  }
};

template <class Type>
struct Pack {
  static constexpr Input kInput = Input::kFloats;
  static constexpr int kOut = 1;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = pack<Type>(as_float(in[0]), as_float(in[1]));
  }
};

template <class Type>
struct Widen {
  static constexpr Input kInput = Input::kBits;
  static constexpr int kOut = 2;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = as_bits(widen<Type>(static_cast<uint16_t>(in[0])));
    out[1] = as_bits(widen<Type>(static_cast<uint16_t>(in[0] >> 16)));
  }
};

struct Shuffle {
  static constexpr Input kInput = Input::kBits;
  static constexpr int kOut = 2;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    out[0] = static_cast<uint32_t>(
        shuffle(static_cast<int>(in[0]), static_cast<int>(in[1] % kWarpSize)));
    out[1] = as_bits(shuffle_xor(as_float(in[2] & 0x3FFFFFFFu), 5));
  }
};

// Lane i writes row i and asks for row i ^ 5.
template <Transposed kTransposed, int kCount>
struct LdMatrix {
  static constexpr Input kInput = Input::kBits;
  static constexpr int kOut = kCount;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    st_shared(own_row(), U32x4{in[0], in[1], in[2], in[3]});
    sync_warp();
    uint32_t registers[kCount];
    ldmatrix<kTransposed>(registers, shared_base() + static_cast<uint32_t>(16 * (lane() ^ 5)));
    for (int i = 0; i < kCount; ++i) out[i] = registers[i];
  }
};

template <class Type>
struct Mma {
  static constexpr Input kInput = Type::is_bfloat16 ? Input::kBFloat16s : Input::kFloat16s;
  static constexpr int kOut = 4;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float c[4] = {widen<Type>(static_cast<uint16_t>(in[6])), 0,
                  widen<Type>(static_cast<uint16_t>(in[7])), 1};
    mma<Type>(c, a, in[4], in[5]);
    for (int i = 0; i < 4; ++i) out[i] = as_bits(c[i]);
  }
};

// Reads as many bytes as the lane's index says; the rest of the row must become zero.
template <int kBytes>
struct CopyAsync {
  static constexpr Input kInput = Input::kBits;
  static constexpr int kOut = 4;
  QUIRE_DEVICE static void run(const uint32_t* in, uint32_t* out) {
    st_shared(own_row(), U32x4{~0u, ~0u, ~0u, ~0u});
    cp_async<kBytes>(own_row(), in, lane() % (kBytes + 1));
    cp_async_commit();
    cp_async_wait<0>();
    const U32x4 row = ld_shared<U32x4>(own_row());
    out[0] = row.x, out[1] = row.y, out[2] = row.z, out[3] = row.w;
  }
};

// name in the file, probe
#define QUIRE_PROBES(P)                          \
  P(fma, Fma)                                    \
  P(mul, Mul)                                    \
  P(max, Max)                                    \
  P(exp2, Exp2)                                  \
  P(log2, Log2)                                  \
  P(rcp, Rcp)                                    \
  P(pack_float16, Pack<Float16>)                 \
  P(pack_bfloat16, Pack<BFloat16>)               \
  P(widen_float16, Widen<Float16>)               \
  P(widen_bfloat16, Widen<BFloat16>)             \
  P(shuffle, Shuffle)                            \
  P(ldmatrix_x1, LdMatrix<Transposed::kNo, 1>)   \
  P(ldmatrix_x2, LdMatrix<Transposed::kNo, 2>)   \
  P(ldmatrix_x4, LdMatrix<Transposed::kNo, 4>)   \
  P(ldmatrix_x4t, LdMatrix<Transposed::kYes, 4>) \
  P(mma_float16, Mma<Float16>)                   \
  P(mma_bfloat16, Mma<BFloat16>)                 \
  P(cp_async_4, CopyAsync<4>)                    \
  P(cp_async_8, CopyAsync<8>)                    \
  P(cp_async_16, CopyAsync<16>)

}  // namespace quire::device::golden
