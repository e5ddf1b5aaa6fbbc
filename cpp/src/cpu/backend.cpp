// SPDX-License-Identifier: Apache-2.0
// The CPU backend: work lists over the thread pool, and cache operations.
#include "quire/backend.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <span>

#include "cpu/backward.h"
#include "cpu/cache_ops.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "quire/error.h"

namespace quire {
namespace cpu {
namespace {

constexpr const char* kFeatures = "dense ragged paged causal window softcap alibi sinks mask lse";
constexpr const char* kQuantisedFeatures =
    "paged causal window softcap alibi sinks mask lse scales";

// Why a tier can't take a description where `isa` is in use, which `tier` is better than or not.
std::string reason_against(const Tier& tier, bool is_better, const AttentionDesc& desc,
                           const std::string& isa) {
  if (is_better) {
    if (!tier.is_supported) return "not supported by this CPU";
    return concat("not forced: QUIRE_CPU_ISA=", isa);
  }
  const int head_dim = std::max(desc.head_dim, desc.head_dim_v);
  if (head_dim > kMaxHeadDim)
    return concat("head_dim ", head_dim, " is not implemented: at most ", kMaxHeadDim);
  if (desc.kv_dtype != desc.dtype && !is_quantised(desc.kv_dtype))
    return concat("kv_dtype: ", name_of(desc.kv_dtype), " KV under ", name_of(desc.dtype),
                  " is not implemented");
  if (desc.kv_dtype != desc.dtype && desc.block_size == 0)
    return concat("kv_dtype: ", name_of(desc.kv_dtype), " KV is implemented for paged caches only");
  return "";
}

// The memory of one run: how far it is, how many items of each merge have ended, and results of
// chunks. The counters are zero before a run and again when all of it has ended. They have the
// first quarter, whatever the plan, so that another plan's results were never in their place.
class Workspace {
 public:
  static size_t size(const AttentionPlan& plan, int head_dim_v) {
    const size_t counters = sizeof(uint32_t) * (kNumCounters + plan.merges.size());
    const size_t partials = sizeof(float) * plan.num_partials * plan.partial_rows *
                            (2 + static_cast<size_t>(head_dim_v));
    return std::max(4 * (counters + kCacheLine), (partials + 2) / 3 * 4);
  }

  Workspace(const AttentionPlan& plan, std::span<std::byte> memory)
      : plan_(plan),
        counters_(reinterpret_cast<uint32_t*>(memory.data())),
        partials_(reinterpret_cast<float*>(memory.data() +
                                           memory.size() / 4 / kCacheLine * kCacheLine)) {}

  float* partials() const { return partials_; }
  void clear() const { std::fill_n(counters_, kNumCounters + plan_.merges.size(), 0u); }

  // The next unit of work for whoever asks.
  size_t draw() const { return counter(kNext).fetch_add(1, std::memory_order_relaxed); }
  // To be told by each of `count` parts that draws no more.
  void leave(int count) const {
    if (counter(kLeft).fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(count))
      std::fill_n(counters_, kNumCounters, 0u);
  }
  // True for the last of a merge's items to arrive.
  bool arrive(int merge) const {
    const auto last = static_cast<uint32_t>(plan_.merges[merge].num_items - 1);
    if (counter(kNumCounters + merge).fetch_add(1, std::memory_order_acq_rel) != last) return false;
    counters_[kNumCounters + merge] = 0;
    return true;
  }

 private:
  enum { kNext, kLeft, kNumCounters };
  static constexpr size_t kCacheLine = 64;
  std::atomic_ref<uint32_t> counter(size_t i) const {
    return std::atomic_ref<uint32_t>(counters_[i]);
  }

  const AttentionPlan& plan_;
  uint32_t* counters_;  // draws, parts that have left, then one a merge
  float* partials_;
};

// The calling thread's memory, kept for its next run; contents are undefined.
std::span<std::byte> thread_memory(size_t size) {
  thread_local std::unique_ptr<std::byte[]> memory;
  thread_local size_t capacity = 0;
  if (size > capacity) {
    memory.reset();
    capacity = 0;
    memory = std::make_unique_for_overwrite<std::byte[]>(size);
    capacity = size;
  }
  return {memory.get(), capacity};
}

void run_unit(const Kernels& kernels, const AttentionPlan& plan, const Run& run,
              const Workspace& workspace, size_t index) {
  const WorkUnit& unit = plan.units[index];
  const std::span items(plan.items.data() + unit.begin, plan.items.data() + unit.end);
  kernels.attend(run, items);
  for (const WorkItem& item : items)
    if (item.merge >= 0 && workspace.arrive(item.merge))
      kernels.merge(run, plan.merges[item.merge]);
}

class CpuBackend final : public Backend {
 public:
  const char* name() const override { return "cpu"; }

  DeviceInfo device_info(int) const override { return {{}, kernels_in_use().isa, num_threads()}; }

  std::vector<Candidate> candidates(const AttentionDesc& desc,
                                    const DeviceInfo& device) const override {
    std::vector<Candidate> result;
    bool is_better = true;
    for (const Tier& tier : tiers()) {
      if (device.isa == tier.kernels->isa) is_better = false;
      result.push_back({std::string("cpu.") + tier.kernels->isa,
                        reason_against(tier, is_better, desc, device.isa)});
    }
    return result;
  }

  PlanTraits plan_traits(const AttentionDesc& desc, const DeviceInfo& device) const override {
    // More rows share the packing of K and V, as long as q and the state of all of them stay in
    // the L2 cache beside it, and as there is enough work to go round.
    constexpr int kCacheBytes = 576 << 10;
    const int most = device.parallelism > 16 ? 192 : 384;
    const int bytes_a_row = 4 * (desc.head_dim + 2 * desc.head_dim_v);
    return {device.parallelism, std::clamp(kCacheBytes / bytes_a_row, 48, most),
            Sharing::kWherePays};
  }

  std::shared_ptr<void> prepare(const AttentionDesc&, const AttentionPlan&, Device) const override {
    return nullptr;
  }

  size_t workspace_size(const AttentionDesc& desc, const AttentionPlan& plan) const override {
    return Workspace::size(plan, desc.head_dim_v);
  }

  void run(const AttentionPlan& plan, const AttentionParams& params, const Stream&) const override {
    const Workspace workspace(plan, thread_memory(Workspace::size(plan, params.head_dim_v)));
    workspace.clear();
    const Run run{params, workspace.partials(), plan.partial_rows};
    const Kernels& kernels = kernels_in_use();
    parallel_for(static_cast<int64_t>(plan.units.size()), [&](int64_t i) {
      run_unit(kernels, plan, run, workspace, static_cast<size_t>(i));
    });
  }

  void run_part(const AttentionPlan& plan, const AttentionParams& params,
                std::span<std::byte> memory, int nth) const override {
    const Workspace workspace(plan, memory);
    const Run run{params, workspace.partials(), plan.partial_rows};
    const Kernels& kernels = kernels_in_use();
    for (size_t i; (i = workspace.draw()) < plan.units.size();)
      run_unit(kernels, plan, run, workspace, i);
    workspace.leave(nth);
  }

  void attention_backward(const BackwardParams& params) const override {
    cpu::attention_backward(params);
  }

  void append_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache,
                 const TensorView& v_cache, const TensorView& slot_mapping, const Rope* rope,
                 const KvScales& scales, const Stream&) const override {
    if (is_quantised(k_cache.dtype)) {
      quantise_rows(k, k_cache, slot_mapping, rope, scales.k);
      quantise_rows(v, v_cache, slot_mapping, nullptr, scales.v);
      return;
    }
    if (rope)
      scatter_rotated_rows(k, k_cache, slot_mapping, *rope);
    else
      scatter_rows(k, k_cache, slot_mapping);
    scatter_rows(v, v_cache, slot_mapping);
  }

  void apply_rope(const TensorView& x, const Rope& rope, const TensorView& out,
                  const Stream&) const override {
    cpu::rotate_rows(x, rope, out);
  }

  void copy_blocks(const TensorView& k_cache, const TensorView& v_cache, const TensorView& src_dst,
                   const Stream&) const override {
    cpu::copy_blocks(k_cache, k_cache, src_dst);
    cpu::copy_blocks(v_cache, v_cache, src_dst);
  }

  void swap_blocks(const TensorView& src, const TensorView& dst, const TensorView& src_dst,
                   const Stream&) const override {
    cpu::copy_blocks(src, dst, src_dst);
  }

  void merge_states(const TensorView& outs, const TensorView& lses, const TensorView& out,
                    const TensorView& lse, const Stream&) const override {
    cpu::merge_states(outs, lses, out, lse);
  }

  std::vector<Capability> capabilities() const override {
    std::vector<Capability> rows;
    for (const Tier& tier : tiers()) {
      const auto add = [&](DType dtype, DType kv) {
        rows.push_back({"cpu", tier.kernels->isa, name_of(dtype), name_of(kv), 1, kMaxHeadDim,
                        is_quantised(kv) ? kQuantisedFeatures : kFeatures, tier.is_supported});
      };
      for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
        for (DType kv : {dtype, DType::kFloat8E4M3, DType::kFloat8E5M2, DType::kInt8})
          add(dtype, kv);
      add(DType::kFloat8E4M3, DType::kFloat8E4M3);
    }
    return rows;
  }
};

}  // namespace
}  // namespace cpu

Backend* cpu_backend() {
  static cpu::CpuBackend backend;
  return &backend;
}

}  // namespace quire
