// SPDX-License-Identifier: Apache-2.0
// The tier "avx512_amx": that of avx512_bf16.cpp, but prefill multiplies bfloat16 by AMX tiles.
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

QUIRE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")
namespace quire::cpu::avx512_amx {
namespace {
// clang-format off: in this order
#include "cpu/simd_avx512.h"
#include "cpu/words.h"
#include "cpu/words_bf16.h"
#include "cpu/words_amx.h"
#include "cpu/attention_kernels.h"
// clang-format on
}  // namespace
}  // namespace quire::cpu::avx512_amx
QUIRE_TARGET_END

namespace quire::cpu {

const Kernels kAvx512AmxKernels = {"avx512_amx",
                                   avx512_amx::attend,
                                   avx512_amx::merge,
                                   avx512_amx::prepare_backward,
                                   avx512_amx::backward,
                                   avx512_amx::quantise,
                                   avx512_amx::multiply_adds,
                                   avx512_amx::read_all};

}  // namespace quire::cpu
