// SPDX-License-Identifier: Apache-2.0
// Memory that kernels use while they work on one item: grown, kept, one a thread.
#pragma once

#include <cstddef>

namespace quire::cpu {

// Aligned to cache lines; contents are undefined; valid until this thread's next call.
float* thread_scratch(size_t num_floats);

// The same, rounded so that the next array begins on a cache line.
constexpr size_t padded(size_t num_floats) { return (num_floats + 15) / 16 * 16; }

}  // namespace quire::cpu
