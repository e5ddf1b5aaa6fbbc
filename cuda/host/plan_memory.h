// SPDX-License-Identifier: Apache-2.0
// Plans on a GPU: their work lists, sorted by the kernel that takes them, and room for partial
// results. SentPlan's were made by the host; for those that the device makes see device_plan.h.
#pragma once

#include <array>
#include <mutex>
#include <thread>
#include <vector>

#include "host/gpu.h"
#include "host/select.h"
#include "kernels/launch.h"

namespace quire::cuda {

// The per-thread default stream is as many streams as there are threads.
struct StreamId {
  Handle handle = nullptr;
  std::thread::id thread;

  StreamId() = default;
  explicit StreamId(Handle handle);
  bool operator==(const StreamId&) const = default;
};

// Where the parts of a plan lie, in bytes from the begin of a slab. The first `staged_bytes` are
// sent from the host; counters and tickets are among them, as they begin as zero.
struct PlanLayout {
  size_t items, merges, block_ids, counters, tickets, staged_bytes;
  size_t partial_values, partial_stats, totals, total_bytes;

  // `counters_a_merge`: one for each of the blocks that share the rows of an item. `global_bytes`:
  // what all blocks work in.
  PlanLayout(const AttentionPlan& plan, int head_dim, int counters_a_merge, size_t global_bytes);
};

class PlanOnGpu {
 public:
  // What one kernel is launched for: work items [first, first + count) of the sorted list, or,
  // where the device has made it, those that it says.
  struct Segment {
    Phase phase;
    int first, count;
    int rows;  // of the item that has the most
    int64_t blocks;
  };

  virtual ~PlanOnGpu() = default;
  PlanOnGpu(const PlanOnGpu&) = delete;

  Gpu& gpu() const { return gpu_; }
  const KernelSet& kernels() const { return kernels_; }
  const std::vector<Segment>& segments() const { return segments_; }
  bool was_made_for(const AttentionParams& params) const;

  virtual size_t bytes() const = 0;  // for each stream it runs on
  // Fills in what `args` needs of the plan, and sees that it is on the device before whatever is
  // put on the stream next.
  virtual void use(Handle stream, device::AttentionArgs& args) = 0;

 protected:
  PlanOnGpu(Gpu& gpu, const AttentionDesc& desc);
  // Loading takes long and may not happen while a stream is captured: plans do it when made.
  void add_segment(const Segment& segment);
  int64_t resident_blocks(Phase phase) const;  // that the GPU runs at once
  // Of device memory that so many blocks of kWide, or those that run at once, work in.
  size_t global_bytes(int64_t blocks) const;

  Gpu& gpu_;
  const KernelSet kernels_;
  const int num_heads_, num_kv_heads_, head_dim_, head_dim_v_;
  const ElementType dtype_, kv_dtype_;
  const bool is_paged_;

 private:
  std::vector<Segment> segments_;
};

// Made by plan(), before any stream is known; the first run on a stream sends the lists ahead of
// its kernels. Every stream has a copy of its own, so runs on several streams do not meet. Streams
// must outlive the plan, and the plan must outlive graphs that were captured from it.
class SentPlan final : public PlanOnGpu {
 public:
  SentPlan(Gpu& gpu, const AttentionDesc& desc, const AttentionPlan& plan);
  ~SentPlan() override;

  size_t bytes() const override { return layout_.total_bytes; }
  void use(Handle stream, device::AttentionArgs& args) override;

 private:
  struct Copy {  // one stream's
    StreamId stream;
    Slab* slab;
    bool is_sent = false;
    uint64_t capture = 0;  // the latest capture that sends it
  };

  void stage(const AttentionPlan& plan);
  Copy& copy_for(const StreamId& stream);
  void send(Copy& copy);

  PlanLayout layout_;
  int num_partial_rows_;
  std::vector<std::byte> staged_;
  std::mutex mutex_;  // of copies_
  std::vector<Copy> copies_;
};

}  // namespace quire::cuda
