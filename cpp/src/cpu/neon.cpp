// SPDX-License-Identifier: Apache-2.0
// The tier "neon": the attention kernels for any AArch64 CPU.
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

namespace quire::cpu::neon {
namespace {
// clang-format off: in this order
#include "cpu/simd_neon.h"
#include "cpu/attention_kernels.h"
// clang-format on
}  // namespace
}  // namespace quire::cpu::neon

namespace quire::cpu {

const Kernels kNeonKernels = {
    "neon",         neon::attend,   neon::merge,         neon::prepare_backward,
    neon::backward, neon::quantise, neon::multiply_adds, neon::read_all};

}  // namespace quire::cpu
