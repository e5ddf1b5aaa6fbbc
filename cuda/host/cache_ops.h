// SPDX-License-Identifier: Apache-2.0
// The operations on a paged cache beside attention: tensors to kernel arguments, and the launch.
#pragma once

#include "host/gpu.h"
#include "quire/cache_ops.h"

namespace quire::cuda {

void append_kv(Gpu& gpu, const TensorView& k, const TensorView& v, const TensorView& k_cache,
               const TensorView& v_cache, const TensorView& slot_mapping, const Rope* rope,
               const KvScales& scales, Handle stream);
void apply_rope(Gpu& gpu, const TensorView& x, const Rope& rope, const TensorView& out,
                Handle stream);
void copy_blocks(Gpu& gpu, const TensorView& k_cache, const TensorView& v_cache,
                 const TensorView& src_dst, Handle stream);
void swap_blocks(Gpu& gpu, const TensorView& src, const TensorView& dst, const TensorView& src_dst,
                 Handle stream);
void merge_states(Gpu& gpu, const TensorView& outs, const TensorView& lses, const TensorView& out,
                  const TensorView& lse, Handle stream);

}  // namespace quire::cuda
