// SPDX-License-Identifier: Apache-2.0
// What the elements of a quantised KV cache are multiplied by.
#pragma once

#include "quire/kernel_params.h"
#include "quire/tensor.h"

namespace quire {

// Each is empty (1), or float32: [1] on the CPU, a number for the whole tensor, finite and > 0;
// [num_kv_heads]; or [num_blocks, block_size, num_kv_heads], one a token and head. Any strides.
//
//   float number = 0.5f;
//   KvScales scales = {.k = {&number, DType::kFloat32, {1}}};
struct KvScales {
  TensorView k, v;
};

// A scale as kernels read it.
KvScale kernel_scale(const TensorView& scale);

}  // namespace quire
