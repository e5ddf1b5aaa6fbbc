// SPDX-License-Identifier: Apache-2.0
// The tier "neon_bf16": that of neon.cpp, but prefill multiplies bfloat16 as it is.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include <arm_neon.h>

#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

QUIRE_TARGET_BEGIN("arch=armv8.2-a+bf16")
namespace quire::cpu::neon_bf16 {
namespace {
// clang-format off: in this order
#include "cpu/simd_neon.h"
#include "cpu/words.h"
#include "cpu/words_neon_bf16.h"
#include "cpu/attention_kernels.h"
// clang-format on
}  // namespace
}  // namespace quire::cpu::neon_bf16
QUIRE_TARGET_END

namespace quire::cpu {

const Kernels kNeonBf16Kernels = {
    "neon_bf16",         neon_bf16::attend,   neon_bf16::merge,         neon_bf16::prepare_backward,
    neon_bf16::backward, neon_bf16::quantise, neon_bf16::multiply_adds, neon_bf16::read_all};

}  // namespace quire::cpu
