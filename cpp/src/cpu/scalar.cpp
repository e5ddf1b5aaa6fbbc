// SPDX-License-Identifier: Apache-2.0
// The tier "scalar": the attention kernels in portable C++.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace quire::cpu::scalar {
namespace {
// clang-format off: in this order
#include "cpu/simd_scalar.h"
#include "cpu/attention_kernels.h"
// clang-format on
}  // namespace
}  // namespace quire::cpu::scalar

namespace quire::cpu {

const Kernels kScalarKernels = {
    "scalar",         scalar::attend,   scalar::merge,         scalar::prepare_backward,
    scalar::backward, scalar::quantise, scalar::multiply_adds, scalar::read_all};

}  // namespace quire::cpu
