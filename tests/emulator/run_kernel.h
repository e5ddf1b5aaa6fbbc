// SPDX-License-Identifier: Apache-2.0
// Runs an attention kernel on the emulator over a plan.
#pragma once

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <vector>

#include "emulator/launch.h"
#include "host/boxes.h"
#include "kernels/args.h"
#include "quire/attention.h"

namespace quire::emulator {

// A kernel with its traits bound, and what its launch needs.
struct AttentionKernel {
  std::function<void(const device::BoxedAttentionArgs&)> run;
  int head_dim;
  int rows;
  int threads;
  int shared_bytes;
  bool is_bfloat16;
  int box_rows = 0;      // at most; 0: it takes no tensor maps
  int global_bytes = 0;  // that a block works in
};

template <class Traits>
AttentionKernel bind(void (*run)(const device::AttentionArgs&)) {
  return {[run](const device::BoxedAttentionArgs& args) { run(args.attention); },
          Traits::kHeadDim,
          Traits::kRows,
          Traits::kThreads,
          Traits::kSharedBytes,
          Traits::Type::is_bfloat16};
}

template <class Traits>
AttentionKernel bind(void (*run)(const device::BoxedAttentionArgs&)) {
  return {run,
          Traits::kHeadDim,
          Traits::kRows,
          Traits::kThreads,
          Traits::kSharedBytes,
          Traits::Type::is_bfloat16,
          Traits::kWarpKeys,
          Traits::kGlobalBytes};
}

inline device::TensorMap tensor_map(const AttentionParams& params, bool is_k, int rows) {
  const cuda::BoxedTensor tensor = cuda::boxed_tensor(params, is_k, rows);
  device::TensorMap map;
  if (!encode_tensor_map(&map, tensor.base, tensor.dims, tensor.strides, tensor.box))
    throw std::runtime_error("no tensor map of k or v");
  return map;
}

// Partial results and the places that blocks work in, which begin as NaN, the counters, and the
// items as lists have them; one that is nonsense comes before those that are meant.
struct Workspace {
  std::vector<float> values, stats, totals;
  std::vector<uint32_t> counters;
  std::vector<device::ListedItem> items;
  device::ItemRange range;
};

// Of an item.
inline int most_rows(const AttentionPlan& plan, const AttentionParams& params) {
  int most = 0;
  for (const WorkItem& item : plan.items)
    most = std::max(most, (item.q_end - item.q_begin) * params.num_heads / params.num_kv_heads);
  return most;
}

inline Report run_kernel(const AttentionKernel& kernel, const AttentionParams& params,
                         const AttentionPlan& plan, bool is_aligned, Workspace& workspace,
                         Options options, int blocks) {
  const int row_tiles = device::ceil_div(most_rows(plan, params), kernel.rows);
  const size_t rows = static_cast<size_t>(plan.num_partials) * plan.partial_rows;
  workspace.values.assign(rows * kernel.head_dim, NAN);
  workspace.stats.assign(rows * 2, NAN);
  workspace.totals.assign(static_cast<size_t>(blocks) * kernel.global_bytes / 4, NAN);
  workspace.counters.assign(plan.merges.size() * row_tiles + 1, 0);
  device::BoxedAttentionArgs boxed{};
  device::AttentionArgs& args = boxed.attention;
  args.params = params;
  args.params.sequences = nullptr;
  workspace.items.assign(1, {{1 << 30, 1 << 30, 0, 1 << 30, 0, 1 << 30, -1, -1}, {}});
  for (const WorkItem& item : plan.items)
    workspace.items.push_back({item, plan.sequences[item.sequence]});
  args.items = workspace.items.data() + 1;
  args.num_items = static_cast<int32_t>(plan.items.size());
  args.item_rows = most_rows(plan, params);
  if (options.seed % 2 == 1) {  // as a device that plans says them: a range of a list
    workspace.range = {1, args.num_items + 1};
    args.items = workspace.items.data();
    args.num_items = 0;
    args.range = &workspace.range;
  }
  args.merges = plan.merges.data();
  args.partial_values = workspace.values.data();
  args.partial_stats = workspace.stats.data();
  args.partial_rows = plan.partial_rows;
  args.totals = workspace.totals.data();
  args.counters = workspace.counters.data();
  args.tickets = &workspace.counters.back();
  args.is_aligned = is_aligned;
  boxed.box_rows = cuda::box_rows(params, is_aligned, kernel.box_rows);
  if (boxed.box_rows > 0) {
    boxed.k = tensor_map(params, true, boxed.box_rows);
    boxed.v = tensor_map(params, false, boxed.box_rows);
  }
  if (!options.global.allows_all()) {
    const auto allow = [&options](const auto& array) {
      options.global.allow(array.data(), array.size() * sizeof(array[0]));
    };
    allow(plan.merges), allow(plan.block_ids);
    allow(workspace.values), allow(workspace.stats), allow(workspace.counters);
    allow(workspace.totals), allow(workspace.items),
        options.global.allow(&workspace.range, sizeof workspace.range);
  }
  return launch({blocks, kernel.threads, kernel.shared_bytes}, options, [&] { kernel.run(boxed); });
}

}  // namespace quire::emulator
