// SPDX-License-Identifier: Apache-2.0
// K and V as bulk copies see them: tensors of rank 4, brought in boxes of rows. Pure; the driver
// makes tensor maps of it.
#pragma once

#include <cstdint>

#include "quire/kernel_params.h"

namespace quire::cuda {

struct BoxedTensor {
  const void* base;
  uint64_t dims[4];     // column, row, kv head, block or sequence
  uint64_t strides[3];  // bytes, of all but the columns
  uint32_t box[4];
};

// Rows of a box: at most `most`, a power of 2. 0 where bulk copies are of no use: rows that do not
// begin at multiples of 16 bytes, or blocks of fewer than the 8 rows that are swizzled together.
inline int32_t box_rows(const AttentionParams& p, bool is_aligned, int32_t most) {
  const bool has_codes = p.kv_dtype == ElementType::kFloat8E4M3;
  if (has_codes && (p.head_dim % 2 != 0 || p.head_dim_v % 2 != 0)) return 0;
  int32_t rows = is_aligned ? most : 0;
  while (rows >= 8 && p.block_size % rows != 0) rows /= 2;
  return rows >= 8 ? rows : 0;
}

// The dimension of rows, unless they are in blocks, and the one of blocks or sequences are as long
// as may be: kernels ask for nothing that a sequence does not have.
inline BoxedTensor boxed_tensor(const AttentionParams& p, bool is_k, int32_t rows) {
  constexpr uint64_t kEndless = uint64_t{1} << 30;
  // Maps are of elements of two bytes: of codes, pairs.
  const uint64_t element_bytes = p.kv_dtype == ElementType::kFloat8E4M3 ? 1 : 2;
  const bool is_paged = p.block_size > 0;
  const int64_t row = is_k ? p.k_stride_row : p.v_stride_row;
  const int64_t head = is_k ? p.k_stride_head : p.v_stride_head;
  const int64_t block = is_k ? p.k_stride_block : p.v_stride_block;
  const int64_t sequence = is_k ? p.k_stride_seq : p.v_stride_seq;
  // A dimension that is not walked may have any stride, but not that of nothing.
  const auto bytes = [element_bytes](int64_t stride) {
    return stride == 0 ? uint64_t{16} : static_cast<uint64_t>(stride) * element_bytes;
  };
  return {is_k ? p.k : p.v,
          {static_cast<uint64_t>(is_k ? p.head_dim : p.head_dim_v) * element_bytes / 2,
           is_paged ? static_cast<uint64_t>(p.block_size) : kEndless,
           static_cast<uint64_t>(p.num_kv_heads), kEndless},
          {bytes(row), bytes(head), bytes(is_paged ? block : sequence)},
          {64, static_cast<uint32_t>(rows), 1, 1}};
}

}  // namespace quire::cuda
