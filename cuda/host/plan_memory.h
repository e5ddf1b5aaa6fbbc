// SPDX-License-Identifier: Apache-2.0
// A plan on a GPU: its work lists, sorted by the kernel that takes them, and room for partial
// results.
#pragma once

#include <array>
#include <mutex>
#include <thread>
#include <vector>

#include "host/gpu.h"
#include "host/select.h"
#include "kernels/launch.h"

namespace quire::cuda {

// Where the parts of a plan lie, in bytes from the begin of a slab. The first `staged_bytes` are
// sent from the host; counters are among them, as they begin as zero.
struct PlanLayout {
  size_t sequences, items, merges, block_ids, counters, staged_bytes;
  size_t partial_values, partial_stats, total_bytes;

  // `counters_a_merge`: one for each of the blocks that share the rows of an item.
  PlanLayout(const AttentionPlan& plan, int head_dim, int counters_a_merge);
};

// Made by plan(), before any stream is known; the first run on a stream sends the lists ahead of
// its kernels. Every stream has a copy of its own, so runs on several streams do not meet. Streams
// must outlive the plan, and the plan must outlive graphs that were captured from it.
class PlanOnGpu {
 public:
  // Work items [first, first + count) of the sorted list.
  struct Segment {
    Phase phase;
    int first, count;
    int rows;  // of the item that has the most
  };

  PlanOnGpu(Gpu& gpu, const AttentionDesc& desc, const AttentionPlan& plan);
  ~PlanOnGpu();

  Gpu& gpu() const { return gpu_; }
  const KernelSet& kernels() const { return kernels_; }
  const std::vector<Segment>& segments() const { return segments_; }
  size_t bytes() const { return layout_.total_bytes; }  // for each stream it runs on
  bool was_made_for(const AttentionParams& params) const;

  // Fills in what `args` needs of the plan, and sees that it is on the device before whatever is
  // put on the stream next.
  void use(Handle stream, device::AttentionArgs& args);

 private:
  // One stream's copy. The per-thread default stream is as many streams as there are threads.
  struct Copy {
    Handle stream;
    std::thread::id thread;
    Slab* slab;
    bool is_sent = false;
    uint64_t capture = 0;  // the latest capture that sends it
  };

  void stage(const AttentionPlan& plan);
  Copy& copy_for(Handle stream);
  void send(Copy& copy);

  Gpu& gpu_;
  KernelSet kernels_;
  PlanLayout layout_;
  int num_heads_, num_kv_heads_, head_dim_, head_dim_v_;
  ElementType dtype_, kv_dtype_;
  int num_partial_rows_;
  bool is_paged_;
  std::vector<Segment> segments_;
  std::vector<std::byte> staged_;
  std::mutex mutex_;  // of copies_
  std::vector<Copy> copies_;
};

}  // namespace quire::cuda
