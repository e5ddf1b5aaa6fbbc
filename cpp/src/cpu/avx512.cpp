// SPDX-License-Identifier: Apache-2.0
// The tier "avx512": the attention kernels compiled for AVX-512 F, BW, DQ and VL.
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

QUIRE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace quire::cpu::avx512 {
namespace {
// clang-format off: in this order
#include "cpu/simd_avx512.h"
#include "cpu/attention_kernels.h"
// clang-format on
}  // namespace
}  // namespace quire::cpu::avx512
QUIRE_TARGET_END

namespace quire::cpu {

const Kernels kAvx512Kernels = {
    "avx512",         avx512::attend,   avx512::merge,         avx512::prepare_backward,
    avx512::backward, avx512::quantise, avx512::multiply_adds, avx512::read_all};

}  // namespace quire::cpu
