// SPDX-License-Identifier: Apache-2.0
// The tier "avx2": the attention kernels compiled for AVX2, FMA and F16C.
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

QUIRE_TARGET_BEGIN("avx2,fma,f16c")
namespace quire::cpu::avx2 {
namespace {
// clang-format off: in this order
#include "cpu/simd_avx2.h"
#include "cpu/attention_kernels.h"
// clang-format on
}  // namespace
}  // namespace quire::cpu::avx2
QUIRE_TARGET_END

namespace quire::cpu {

const Kernels kAvx2Kernels = {
    "avx2",         avx2::attend,   avx2::merge,         avx2::prepare_backward,
    avx2::backward, avx2::quantise, avx2::multiply_adds, avx2::read_all};

}  // namespace quire::cpu
