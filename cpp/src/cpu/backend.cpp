// SPDX-License-Identifier: Apache-2.0
// The CPU backend: work lists over the thread pool, and cache operations.
#include "quire/backend.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/backward.h"
#include "cpu/cache_ops.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "quire/error.h"

namespace quire {
namespace cpu {
namespace {

constexpr int kMaxHeadDim = 512;
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

// Partial results and counters of one run, kept by the calling thread for its next one.
class Workspace {
 public:
  Run prepare(const AttentionPlan& plan, const AttentionParams& params) {
    const size_t slot = static_cast<size_t>(plan.partial_rows) * (2 + params.head_dim_v);
    if (partials_.size() < slot * plan.num_partials) partials_.resize(slot * plan.num_partials);
    if (plan.merges.size() > num_counters_) {
      counters_ = std::make_unique<std::atomic<int>[]>(plan.merges.size());
      num_counters_ = plan.merges.size();
    }
    for (size_t i = 0; i < plan.merges.size(); ++i) counters_[i] = plan.merges[i].num_items;
    return {params, partials_.data(), plan.partial_rows};
  }
  // True for the last of a merge's items to arrive.
  bool arrive(int merge) { return counters_[merge].fetch_sub(1, std::memory_order_acq_rel) == 1; }

 private:
  std::vector<float> partials_;
  std::unique_ptr<std::atomic<int>[]> counters_;
  size_t num_counters_ = 0;
};

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
    return {device.parallelism, std::clamp(kCacheBytes / bytes_a_row, 48, most)};
  }

  std::shared_ptr<void> prepare(const AttentionDesc&, const AttentionPlan&, Device) const override {
    return nullptr;
  }

  size_t workspace_size(const AttentionDesc& desc, const AttentionPlan& plan) const override {
    const size_t slot = static_cast<size_t>(plan.partial_rows) * (2 + desc.head_dim_v);
    return slot * plan.num_partials * sizeof(float) + plan.merges.size() * sizeof(int);
  }

  void run(const AttentionPlan& plan, const AttentionParams& params, const Stream&) const override {
    thread_local Workspace workspace;
    Workspace& shared = workspace;  // the caller's, also in the other threads
    const Run run = shared.prepare(plan, params);
    const Kernels& kernels = kernels_in_use();
    parallel_for(static_cast<int64_t>(plan.items.size()), [&](int64_t i) {
      const WorkItem& item = plan.items[i];
      kernels.attend(run, item);
      if (item.merge >= 0 && shared.arrive(item.merge)) kernels.merge(run, plan.merges[item.merge]);
    });
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
    for (const Tier& tier : tiers())
      for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
        for (DType kv : {dtype, DType::kFloat8E4M3, DType::kFloat8E5M2, DType::kInt8})
          rows.push_back({"cpu", tier.kernels->isa, name_of(dtype), name_of(kv), 1, kMaxHeadDim,
                          is_quantised(kv) ? kQuantisedFeatures : kFeatures, tier.is_supported});
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
