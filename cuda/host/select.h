// SPDX-License-Identifier: Apache-2.0
// Which kernels serve a model's attention, and which of them serves a sequence. Pure.
#pragma once

#include <string>
#include <vector>

#include "host/registry.h"
#include "kernels/launch.h"
#include "quire/attention.h"

namespace quire::cuda {

using device::kDecode;
using device::kNarrow;
using device::kNumPhases;
using device::kWide;
using device::Phase;

// Rows that are better streamed past by the decode kernel, 16 at a time, than padded to a tile.
inline constexpr int kDecodeRows = 32;

// The kernels of one head dim, by phase and mode; of kWide there may be none.
struct KernelSet {
  int head_dim = 0;  // of the tiles
  const Kernel* kernels[kNumPhases][2] = {};

  bool is_complete() const;
  bool is_latent() const { return kernels[kDecode][0]->latent_dim > 0; }
  bool has_wide() const { return kernels[kWide][0] != nullptr; }
  int max_rows() const;  // of a work item
  // Rows, of a sequence: its query rows times heads of a kv head.
  int64_t decode_rows() const;  // up to here kDecode; 0 where one kernel serves every sequence
  int64_t wide_rows() const;    // from here on kWide
  Phase phase_of(int64_t rows) const;
  int64_t global_bytes() const;  // of device memory that a block of kWide works in
  // Blocks that share a work item of so many rows.
  int row_tiles(Phase phase, int rows) const;
};

// The head dims there are kernels for, ascending.
std::vector<int> head_dims(ElementType kv_dtype);

// The most of those whose V may be any tensor.
int max_head_dim(DType kv_dtype);

// In the order of kernels.def, what fits the shared memory of `isa`, for values of `head_dim_v`
// columns at most.
KernelSet kernels_for(ElementType dtype, ElementType kv_dtype, int head_dim, int head_dim_v,
                      const std::string& isa);

// The set that serves a description: of the least head dim that is enough.
KernelSet select(const AttentionDesc& desc, const std::string& isa);

// A set for each head dim, smallest first, each with the reason that rules it out.
std::vector<Candidate> candidates(const AttentionDesc& desc, const std::string& isa,
                                  const std::string& archs);

}  // namespace quire::cuda
