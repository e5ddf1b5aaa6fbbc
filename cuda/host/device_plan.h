// SPDX-License-Identifier: Apache-2.0
// A plan that the device makes of lengths that only it knows, so that one captured graph serves
// every batch up to the one it was made for.
#pragma once

#include "host/plan_memory.h"

namespace quire::cuda {

// How much a batch can have, whatever its lengths are: never less than the planner makes of it.
struct PlanBounds {
  int64_t tiles, pieces, merges, partials;
  int partial_rows;

  // A batch of at most `sequences`, `rows` query rows in all and `keys` keys each.
  PlanBounds(const AttentionDesc& desc, int max_rows, int parallelism, int64_t sequences,
             int64_t rows, int64_t keys);
};

// Made and run on one stream. Where that is being captured, plan and runs belong to one capture,
// and what a graph may still read is never used again.
class DevicePlan final : public PlanOnGpu {
 public:
  // The pointers of `batch` are read on the device: by the planner when the stream comes to it, the
  // block table by each run.
  DevicePlan(Gpu& gpu, const AttentionDesc& desc, const AttentionBatch& batch, int max_total_q,
             Handle stream);
  ~DevicePlan() override;

  size_t bytes() const override { return bytes_; }
  void use(Handle stream, device::AttentionArgs& args) override;

 private:
  void add_segments();
  int counters_a_merge() const;
  size_t lay_out(DeviceAddress base);
  void launch_planner(Handle stream, const AttentionDesc& desc);

  const AttentionBatch batch_;
  const int max_total_q_, max_keys_;
  const PlanBounds bounds_;
  device::PlanArgs args_{};  // where the lists lie
  float *partial_values_ = nullptr, *partial_stats_ = nullptr, *totals_ = nullptr;
  size_t bytes_ = 0;
  StreamId stream_;
  uint64_t capture_ = 0;
  Slab* slab_ = nullptr;
};

}  // namespace quire::cuda
