// SPDX-License-Identifier: Apache-2.0
// The attention kernels of one instruction set, as a table. Each set's file fills one in.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/backward.h"
#include "quire/kernel_params.h"

namespace quire::cpu {

// Of queries, keys and values; 576 is a row of a latent cache: 512 of the latent and 64 that RoPE
// turns.
inline constexpr int kMaxHeadDim = 576;

// What the work items of one run share.
struct Run {
  const AttentionParams& params;
  float* partials;  // [slots][partial_rows][2 + head_dim_v]: maximum, sum, values
  int64_t partial_rows;

  // Slots that one chunk of an item of that many rows takes.
  int64_t slots(int64_t rows) const { return (rows + partial_rows - 1) / partial_rows; }

  float* partial(int64_t slot, int64_t row) const {
    return partials + (slot * partial_rows + row) * (2 + int64_t{params.head_dim_v});
  }
};

struct Kernels {
  const char* isa;
  void (*attend)(const Run& run, std::span<const WorkItem> unit);  // see WorkUnit
  void (*merge)(const Run& run, const MergeItem& item);
  // Gradients: first of all tiles of rows, then of all chunks of keys.
  void (*prepare_backward)(const BackwardRun& run, const BackwardHead& head, int tile);
  void (*backward)(const BackwardRun& run, const BackwardHead& head, int chunk);
  // to[d] = row[d] / scale for d < dim, rounded and bounded; `type` is that of a quantised cache.
  void (*quantise)(const float* row, int64_t dim, float scale, ElementType type, void* to);
  // What the machine can do, for roofs.h.
  double (*multiply_adds)(int64_t rounds, bool bfloat16_pairs, float* sink);
  float (*read_all)(const float* data, int64_t count);
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAvx512AmxKernels;
extern const Kernels kNeonKernels;
extern const Kernels kNeonBf16Kernels;

}  // namespace quire::cpu
