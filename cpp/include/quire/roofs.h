// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most, measured: the roofs that kernels are held against.
#pragma once

#include <cstddef>

namespace quire {

// Floating-point operations a second of a loop of nothing but multiply-adds, in the instruction set
// in use, on num_threads() threads. `bfloat16_pairs`: of pairs of bfloat16 where that instruction
// set multiplies them, else of float32 all the same. Takes some 20 ms.
double multiply_add_rate(bool bfloat16_pairs);

// Bytes a second of one sequential read of `data`, divided among num_threads() threads.
double read_rate(const float* data, size_t count);

}  // namespace quire
