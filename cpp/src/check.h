// SPDX-License-Identifier: Apache-2.0
// Checks of tensor arguments. Each failure names the function, the argument, what was expected
// and what came.
#pragma once

#include <string>
#include <vector>

#include "quire/tensor.h"

namespace quire {

// An extent that is fixed (value >= 0), or free and then shown by its name.
struct Extent {
  const char* name;
  int64_t value = -1;
};

// Throws InvalidArgument unless the tensor has this shape and dtype, lies on `device`, and has a
// contiguous last dimension. `argument` reads "paged_attention: v_cache".
void check_tensor(const std::string& argument, const TensorView& tensor,
                  const std::vector<Extent>& shape, DType dtype, Device device = {});

// The same, and the tensor must be writable, with no two elements at one address.
void check_output(const std::string& argument, const TensorView& tensor,
                  const std::vector<Extent>& shape, DType dtype, Device device = {});

// The last clause of that, on its own.
void check_writable(const std::string& argument, const TensorView& tensor);

// Whether all memory between the ends of one tensor lies outside the other's ends.
bool lie_apart(const TensorView& a, const TensorView& b);

// Whether an element of `a` and one of `b` are surely the same memory: the first element of one is
// an element of the other. Rows of two tensors may lie between each other's, as in fused q, k, v.
bool share_memory(const TensorView& a, const TensorView& b);

// A scale of a cache [num_blocks, block_size, num_kv_heads, dim] (kv_scales.h).
void check_scale(const std::string& argument, const TensorView& scale, const TensorView& cache);

// A tensor that kernels read by index alone: no gaps between its elements.
void check_contiguous(const std::string& argument, const TensorView& tensor);

}  // namespace quire
