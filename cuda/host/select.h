// SPDX-License-Identifier: Apache-2.0
// Which kernels serve a model's attention, and which of them serves a sequence. Pure.
#pragma once

#include <string>
#include <vector>

#include "host/registry.h"
#include "quire/attention.h"

namespace quire::cuda {

// What a sequence's rows go through. It is a property of the sequence alone, so that the bits of a
// row do not depend on what else is in the batch.
enum Phase { kWide, kNarrow, kDecode, kNumPhases };

// The kernels of one head dim, by phase and mode; of kWide there may be none.
struct KernelSet {
  int head_dim = 0;  // of the tiles
  const Kernel* kernels[kNumPhases][2] = {};

  bool is_complete() const;
  bool has_wide() const { return kernels[kWide][0] != nullptr; }
  int max_rows() const;                // of a work item
  Phase phase_of(int64_t rows) const;  // rows: query rows times heads of a kv head
};

// The head dims there are kernels for, ascending.
std::vector<int> head_dims(ElementType kv_dtype);

// In the order of kernels.def, what fits the shared memory of `isa`, for values of `head_dim_v`
// columns at most.
KernelSet kernels_for(ElementType dtype, ElementType kv_dtype, int head_dim, int head_dim_v,
                      const std::string& isa);

// The set that serves a description: of the least head dim that is enough.
KernelSet select(const AttentionDesc& desc, const std::string& isa);

ElementType element_type(DType dtype);

// A set for each head dim, smallest first, each with the reason that rules it out.
std::vector<Candidate> candidates(const AttentionDesc& desc, const std::string& isa,
                                  const std::string& archs);

}  // namespace quire::cuda
