// SPDX-License-Identifier: Apache-2.0
// The tier "avx512_bf16": that of avx512.cpp, but prefill multiplies bfloat16 as it is.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include <immintrin.h>

#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

#if defined(__GNUC__) && !defined(__clang__)  // its own intrinsics trip over this warning
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

QUIRE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace quire::cpu::avx512_bf16 {
namespace {
// clang-format off: in this order
#include "cpu/simd_avx512.h"
#include "cpu/words.h"
#include "cpu/words_bf16.h"
template <>
struct Words<BFloat16> : VectorProducts, BFloat16Pairs {
  using Products = Words;
};
#include "cpu/attention_kernels.h"
// clang-format on
}  // namespace
}  // namespace quire::cpu::avx512_bf16
QUIRE_TARGET_END

namespace quire::cpu {

const Kernels kAvx512Bf16Kernels = {"avx512_bf16",
                                    avx512_bf16::attend,
                                    avx512_bf16::merge,
                                    avx512_bf16::prepare_backward,
                                    avx512_bf16::backward,
                                    avx512_bf16::quantise,
                                    avx512_bf16::multiply_adds,
                                    avx512_bf16::read_all};

}  // namespace quire::cpu
