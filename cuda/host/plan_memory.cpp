// SPDX-License-Identifier: Apache-2.0
#include "host/plan_memory.h"

#include <algorithm>
#include <cstring>

#include "host/order.h"
#include "quire/error.h"

namespace quire::cuda {
namespace {

const Handle kPerThreadStream = reinterpret_cast<Handle>(2);

int rows_of(const WorkItem& item, int group) { return (item.q_end - item.q_begin) * group; }

// At most: the tiles of decode have the fewest rows.
int row_tiles(const AttentionPlan& plan, const KernelSet& kernels, int group) {
  int most = 1;
  for (const WorkItem& item : plan.items)
    most = std::max(most, kernels.row_tiles(kDecode, rows_of(item, group)));
  return most;
}

// That there is work for in kWide.
int64_t wide_blocks(const AttentionPlan& plan, const KernelSet& kernels, int group) {
  int64_t items = 0;
  int rows = 0;
  for (const WorkItem& item : plan.items) {
    if (kernels.phase_of(int64_t{plan.sequences[item.sequence].q_len} * group) != kWide) continue;
    ++items;
    rows = std::max(rows, rows_of(item, group));
  }
  return items == 0 ? 0 : items * kernels.row_tiles(kWide, rows);
}

}  // namespace

StreamId::StreamId(Handle handle)
    : handle(handle),
      thread(handle == kPerThreadStream ? std::this_thread::get_id() : std::thread::id()) {}

PlanLayout::PlanLayout(const AttentionPlan& plan, int head_dim, int counters_a_merge,
                       size_t global_bytes) {
  constexpr size_t kAlignment = 64;
  size_t end = 0;
  const auto add = [&end](size_t count, size_t bytes) {
    const size_t begin = end;
    end += (count * bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  };
  const size_t rows = static_cast<size_t>(plan.num_partials) * plan.partial_rows;
  items = add(plan.items.size(), sizeof(device::ListedItem));
  merges = add(plan.merges.size(), sizeof(MergeItem));
  block_ids = add(plan.block_ids.size(), sizeof(int32_t));
  counters = add(plan.merges.size() * counters_a_merge, sizeof(uint32_t));
  tickets = add(plan.items.empty() ? 0 : 1, sizeof(uint32_t));
  staged_bytes = end;
  partial_values = add(rows * head_dim, sizeof(float));
  partial_stats = add(rows * 2, sizeof(float));
  totals = add(global_bytes, 1);
  total_bytes = end;
}

PlanOnGpu::PlanOnGpu(Gpu& gpu, const AttentionDesc& desc)
    : gpu_(gpu),
      kernels_(select(desc, gpu.info().isa)),
      num_heads_(desc.num_heads),
      num_kv_heads_(desc.num_kv_heads),
      head_dim_(desc.head_dim),
      head_dim_v_(desc.value_dim()),
      dtype_(element_type(desc.dtype)),
      kv_dtype_(element_type(desc.kv_dtype)),
      is_paged_(desc.block_size > 0) {}

void PlanOnGpu::add_segment(const Segment& segment) {
  segments_.push_back(segment);
  for (const Kernel* kernel : kernels_.kernels[segment.phase]) gpu_.function(*kernel);
}

int64_t PlanOnGpu::resident_blocks(Phase phase) const {
  return int64_t{gpu_.info().parallelism} * kernels_.kernels[phase][0]->blocks_per_multiprocessor;
}

size_t PlanOnGpu::global_bytes(int64_t blocks) const {
  const int64_t a_block = kernels_.global_bytes();
  return a_block == 0 ? 0 : static_cast<size_t>(std::min(blocks, resident_blocks(kWide)) * a_block);
}

SentPlan::SentPlan(Gpu& gpu, const AttentionDesc& desc, const AttentionPlan& plan)
    : PlanOnGpu(gpu, desc),
      layout_(plan, kernels_.head_dim, row_tiles(plan, kernels_, num_heads_ / num_kv_heads_),
              global_bytes(wide_blocks(plan, kernels_, num_heads_ / num_kv_heads_))),
      num_partial_rows_(plan.partial_rows) {
  const ContextScope scope(gpu_);
  stage(plan);
  if (layout_.total_bytes > 0)
    copies_.push_back({{}, gpu_.acquire(layout_.staged_bytes, layout_.total_bytes)});
}

SentPlan::~SentPlan() {
  // What a graph may still read is never used again.
  for (const Copy& copy : copies_) {
    if (copy.capture != 0) continue;
    try {
      if (copy.is_sent)
        gpu_.release(copy.slab, copy.stream.handle);
      else
        gpu_.release_unused(copy.slab);
    } catch (const std::exception&) {  // the driver has shut down
    }
  }
}

bool PlanOnGpu::was_made_for(const AttentionParams& params) const {
  return params.num_heads == num_heads_ && params.num_kv_heads == num_kv_heads_ &&
         params.head_dim == head_dim_ && params.head_dim_v == head_dim_v_ &&
         params.dtype == dtype_ && params.kv_dtype == kv_dtype_ &&
         (params.block_size > 0) == is_paged_;
}

void SentPlan::stage(const AttentionPlan& plan) {
  staged_.resize(layout_.staged_bytes);
  const auto put = [this](size_t offset, const auto& values) {
    if (!values.empty())
      std::memcpy(staged_.data() + offset, values.data(), values.size() * sizeof(values[0]));
  };
  const int group = num_heads_ / num_kv_heads_;
  const auto phase_of = [&](const WorkItem& item) {
    return kernels_.phase_of(int64_t{plan.sequences[item.sequence].q_len} * group);
  };
  std::vector<WorkItem> sorted;  // by phase; within one, longest first as they came
  sorted.reserve(plan.items.size());
  for (const Phase phase : {kWide, kNarrow, kDecode}) {
    const int first = static_cast<int>(sorted.size());
    int rows = 0;
    for (const WorkItem& item : plan.items) {
      if (phase_of(item) != phase) continue;
      sorted.push_back(item);
      rows = std::max(rows, rows_of(item, group));
    }
    const int count = static_cast<int>(sorted.size()) - first;
    if (count == 0) continue;
    const bool takes_tickets = kernels_.kernels[phase][0]->takes_tickets;
    if (takes_tickets)
      walk_in_sections(
          sorted.begin() + first, sorted.end(), plan.sequences, num_kv_heads_,
          int64_t{head_dim_ + head_dim_v_} * (kv_dtype_ == ElementType::kFloat8E4M3 ? 1 : 2));
    // A block an item, or a tile of its rows: the device deals them out in order, the longest
    // first. Or as many blocks as fit at once, which ask for items in that order.
    const int64_t blocks = int64_t{count} * kernels_.row_tiles(phase, rows);
    add_segment({phase, first, count, rows,
                 takes_tickets ? std::min(blocks, resident_blocks(phase)) : blocks});
  }
  std::vector<device::ListedItem> listed;
  listed.reserve(sorted.size());
  for (const WorkItem& item : sorted) listed.push_back({item, plan.sequences[item.sequence]});
  put(layout_.items, listed);
  put(layout_.merges, plan.merges);
  put(layout_.block_ids, plan.block_ids);
}

SentPlan::Copy& SentPlan::copy_for(const StreamId& stream) {
  for (Copy& copy : copies_)
    if ((copy.is_sent || copy.capture) && copy.stream == stream) return copy;
  for (Copy& copy : copies_)
    if (!copy.is_sent && !copy.capture) {  // the one that plan() has made
      copy.stream = stream;
      return copy;
    }
  copies_.push_back({stream, gpu_.acquire(layout_.staged_bytes, layout_.total_bytes)});
  return copies_.back();
}

void SentPlan::send(Copy& copy) {
  // A copy that is captured happens when the graph runs, and not now: a run outside of the capture
  // needs its own.
  const uint64_t capture = gpu_.capture_of(copy.stream.handle);
  if (capture != 0 && capture == copy.capture) return;
  std::memcpy(copy.slab->host, staged_.data(), staged_.size());
  check(gpu_.driver(),
        gpu_.driver().copy_to_device(copy.slab->device, copy.slab->host, staged_.size(),
                                     copy.stream.handle),
        "cuMemcpyHtoDAsync", "plan");
  if (capture != 0)
    copy.capture = capture;
  else
    copy.is_sent = true;
}

void SentPlan::use(Handle stream, device::AttentionArgs& args) {
  DeviceAddress base;
  {
    std::lock_guard lock(mutex_);
    Copy& copy = copy_for(StreamId(stream));
    if (!copy.is_sent) send(copy);
    base = copy.slab->device;
  }
  const auto at = [base](size_t offset) { return reinterpret_cast<void*>(base + offset); };
  args.params.block_table =
      is_paged_ ? static_cast<const int32_t*>(at(layout_.block_ids)) : nullptr;
  args.items = static_cast<const device::ListedItem*>(at(layout_.items));
  args.merges = static_cast<const MergeItem*>(at(layout_.merges));
  args.counters = static_cast<uint32_t*>(at(layout_.counters));
  args.tickets = static_cast<uint32_t*>(at(layout_.tickets));
  args.partial_values = static_cast<float*>(at(layout_.partial_values));
  args.partial_stats = static_cast<float*>(at(layout_.partial_stats));
  args.totals = static_cast<float*>(at(layout_.totals));
  args.partial_rows = num_partial_rows_;
}

}  // namespace quire::cuda
