// SPDX-License-Identifier: Apache-2.0
// What the kernels of attention's gradients are given: plain data, as kernel_params.h.
#pragma once

#include <cstdint>

#include "quire/kernel_params.h"

namespace quire {

// Strides are in elements, as in AttentionParams.
struct BackwardParams {
  AttentionParams forward;  // of the call whose gradients are wanted; out and lse are read
  int32_t num_sequences;
  const void* dout;  // [total_q, num_heads, head_dim_v]
  void* dq;          // [total_q, num_heads, head_dim]
  void* dk;          // [total_k, num_kv_heads, head_dim]
  void* dv;          // [total_k, num_kv_heads, head_dim_v]
  float* dsinks;     // [num_heads], or null
  int64_t dout_stride_seq, dout_stride_row, dout_stride_head;
  int64_t dq_stride_seq, dq_stride_row, dq_stride_head;
  int64_t dk_stride_seq, dk_stride_row, dk_stride_head;
  int64_t dv_stride_seq, dv_stride_row, dv_stride_head;
};

}  // namespace quire
