// SPDX-License-Identifier: Apache-2.0
#include "host/device_plan.h"

#include <algorithm>
#include <limits>

#include "quire/error.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 512;
using Traits = device::PlannerTraits<kThreads>;

const Kernel& planner() {
  return *std::find_if(std::begin(kKernels), std::end(kKernels),
                       [](const Kernel& kernel) { return kernel.family == Family::kPlan; });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int most_keys(const AttentionDesc& desc, const AttentionBatch& batch) {
  const int64_t keys = int64_t{batch.max_blocks} * desc.block_size;
  return static_cast<int>(std::min<int64_t>(keys, std::numeric_limits<int32_t>::max()));
}

}  // namespace

// A share is a quarter of a worker's part of the cost, of all kv heads: so few tiles cost more than
// that, and so few cuts there are. Rounded down, it is at least 16 / 17 of it where it is 16 or
// more; where it is less, all rows together see fewer keys than 4 times the parallelism, and each
// cut takes another 512.
PlanBounds::PlanBounds(const AttentionDesc& desc, int max_rows, int parallelism, int64_t sequences,
                       int64_t rows, int64_t keys) {
  const int64_t heads = desc.num_kv_heads, group = desc.num_heads / heads;
  const int64_t tile_rows = std::max<int64_t>(1, max_rows / group);
  const int64_t begun = std::min(sequences, rows);  // at most so many tiles are a sequence's last
  tiles = begun + (rows - begun) / tile_rows;
  const int64_t chunks = ceil_div(keys, kKvChunk);
  const int64_t cuts =
      parallelism == 1 || chunks < 2 ? 0 : ceil_div(17 * int64_t{parallelism}, 4 * heads);
  const int64_t split = std::min(tiles, cuts);
  pieces = tiles + std::min(cuts, tiles * std::max<int64_t>(0, chunks - 1));
  merges = split * heads;
  partials = merges * chunks;
  partial_rows = static_cast<int>(std::min(tile_rows, std::max<int64_t>(1, rows)) * group);
}

DevicePlan::DevicePlan(Gpu& gpu, const AttentionDesc& desc, const AttentionBatch& batch,
                       int max_total_q, Handle stream)
    : PlanOnGpu(gpu, desc),
      batch_(batch),
      max_total_q_(max_total_q),
      max_keys_(most_keys(desc, batch)),
      bounds_(desc, kernels_.max_rows(), gpu.info().parallelism, batch.batch_size, max_total_q,
              max_keys_),
      stream_(stream) {
  constexpr int64_t kMostItems = std::numeric_limits<int32_t>::max();
  QUIRE_CHECK_ARG(bounds_.pieces <= Traits::kMaxPieces,
                  "plan: max_total_q: expected a batch of at most ", Traits::kMaxPieces,
                  " runs of rows to plan on the device, got up to ", bounds_.pieces, " for ",
                  batch.batch_size, " sequences and ", max_total_q, " query rows");
  // Costs are 62 bits on the device.
  const double cost = static_cast<double>(bounds_.tiles) * desc.num_kv_heads * max_keys_ *
                      std::max(16, bounds_.partial_rows);
  QUIRE_CHECK_ARG(bounds_.pieces * desc.num_kv_heads <= kMostItems &&
                      bounds_.partials <= kMostItems && cost < 0x1p62,
                  "plan: block_table: expected fewer blocks to plan for on the device, got [",
                  batch.batch_size, ", ", batch.max_blocks, "]");
  const ContextScope scope(gpu_);
  add_segments();
  gpu_.function(planner());
  bytes_ = lay_out(0);
  slab_ = gpu_.acquire(0, bytes_);
  lay_out(slab_->device);
  capture_ = gpu_.capture_of(stream);
  try {
    launch_planner(stream, desc);
  } catch (...) {
    gpu_.release_unused(slab_);
    throw;
  }
}

DevicePlan::~DevicePlan() {
  if (capture_ != 0) return;
  try {
    gpu_.release(slab_, stream_.handle);
  } catch (const std::exception&) {  // the driver has shut down
  }
}

// Whatever phase the batch may have: of those that it turns out not to have, blocks end at once.
void DevicePlan::add_segments() {
  const int64_t group = num_heads_ / num_kv_heads_;
  const int64_t most_q = batch_.cu_seqlens_q ? max_total_q_ : std::min(1, max_total_q_);
  const int64_t wide = kernels_.wide_rows(), items = bounds_.pieces * num_kv_heads_;
  const auto add = [&](Phase phase) {
    const int64_t blocks = items * kernels_.row_tiles(phase, bounds_.partial_rows);
    add_segment({phase, 0, 0, bounds_.partial_rows, std::min(blocks, resident_blocks(phase))});
  };
  if (most_q == 0 || batch_.batch_size == 0) return;
  if (most_q * group >= wide) add(kWide);
  if (std::min(most_q, (wide - 1) / group) * group > kernels_.decode_rows()) add(kNarrow);
  if (group <= kernels_.decode_rows()) add(kDecode);
}

// Returns the bytes from `base` on that the plan takes.
size_t DevicePlan::lay_out(DeviceAddress base) {
  constexpr size_t kAlignment = 64;
  size_t end = 0;
  const auto place = [&](auto*& array, int64_t count) {
    using T = std::remove_reference_t<decltype(*array)>;
    array = reinterpret_cast<T*>(base + end);
    end += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  };
  place(args_.counts, 1);
  place(args_.items, bounds_.pieces * num_kv_heads_);
  place(args_.merges, bounds_.merges);
  place(args_.counters, bounds_.merges * counters_a_merge());
  place(args_.tickets, 1);
  place(args_.first_tiles, batch_.batch_size);
  place(args_.tiles, bounds_.tiles);
  const int64_t rows = bounds_.partials * bounds_.partial_rows;
  place(partial_values_, rows * kernels_.head_dim);
  place(partial_stats_, rows * 2);
  for (const Segment& segment : segments())
    if (segment.phase == kWide)
      place(totals_, static_cast<int64_t>(global_bytes(segment.blocks) / sizeof(float)));
  return end;
}

int DevicePlan::counters_a_merge() const {
  return kernels_.row_tiles(kDecode, bounds_.partial_rows);
}

void DevicePlan::launch_planner(Handle stream, const AttentionDesc& desc) {
  args_.seq_lens = batch_.seq_lens;
  args_.cu_seqlens_q = batch_.cu_seqlens_q;
  args_.num_sequences = batch_.batch_size;
  args_.max_total_q = max_total_q_;
  args_.max_seq_len = max_keys_;
  args_.group = num_heads_ / num_kv_heads_;
  args_.num_kv_heads = num_kv_heads_;
  args_.window_left = desc.window_left;
  args_.window_right = desc.causal ? 0 : desc.window_right;
  args_.parallelism = gpu_.info().parallelism;
  args_.tile_rows = std::max(1, kernels_.max_rows() / args_.group);
  args_.decode_rows = kernels_.decode_rows();
  args_.wide_rows = kernels_.wide_rows();
  args_.counters_a_merge = counters_a_merge();
  args_.max_tiles = static_cast<int32_t>(bounds_.tiles);
  gpu_.launch(planner(), 1, &args_, stream);
}

void DevicePlan::use(Handle stream, device::AttentionArgs& args) {
  QUIRE_CHECK_ARG(StreamId(stream) == stream_,
                  "attention: stream: expected the one on which the plan was made");
  QUIRE_CHECK_ARG(
      capture_ == 0 || gpu_.capture_of(stream) == capture_,
      "attention: plan: expected one that was not made in a capture, or a run in the same "
      "capture");
  args.params.block_table = batch_.block_table;
  args.params.block_table_stride = batch_.block_table_stride;
  args.items = args_.items;
  args.range = args_.counts->ranges;
  args.merges = args_.merges;
  args.counters = args_.counters;
  args.tickets = args_.tickets;
  args.partial_values = partial_values_;
  args.partial_stats = partial_stats_;
  args.totals = totals_;
  args.partial_rows = bounds_.partial_rows;
}

}  // namespace quire::cuda
