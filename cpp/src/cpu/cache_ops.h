// SPDX-License-Identifier: Apache-2.0
// The cache operations of the CPU backend, one cache at a time. Arguments have been checked.
#pragma once

#include "quire/cache_ops.h"
#include "quire/tensor.h"

namespace quire::cpu {

// Row t of `rows` [num_tokens, num_kv_heads, dim] -> slot slot_mapping[t] of `cache`; -1: nowhere.
void scatter_rows(const TensorView& rows, const TensorView& cache, const TensorView& slot_mapping);

// The same with every row turned by `rope`.
void scatter_rotated_rows(const TensorView& rows, const TensorView& cache,
                          const TensorView& slot_mapping, const Rope& rope);

// Row t of `rows`, turned by `rope` unless it is null, -> slot slot_mapping[t] of a quantised
// cache: divided by the scale, which is written first where it is one a token, rounded and bounded.
void quantise_rows(const TensorView& rows, const TensorView& cache, const TensorView& slot_mapping,
                   const Rope* rope, const TensorView& scale);

// Row t of `rows` -> row t of `out`, which may be `rows`, turned by `rope`.
void rotate_rows(const TensorView& rows, const Rope& rope, const TensorView& out);

// Block src_dst[i, 0] of `src` -> block src_dst[i, 1] of `dst`, which may be `src`.
void copy_blocks(const TensorView& src, const TensorView& dst, const TensorView& src_dst);

void merge_states(const TensorView& outs, const TensorView& lses, const TensorView& out,
                  const TensorView& lse);

}  // namespace quire::cpu
