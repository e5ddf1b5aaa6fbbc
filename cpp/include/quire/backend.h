// SPDX-License-Identifier: Apache-2.0
// A backend runs work lists on one kind of device. It knows nothing of allocators, block tables
// of sequences, or policies. Adding a function here is a design decision.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "quire/attention.h"
#include "quire/backward_params.h"
#include "quire/cache_ops.h"
#include "quire/error.h"

namespace quire {

// A row of capabilities(): a combination that works wherever the row says.
struct Capability {
  std::string device;  // "cpu"
  std::string isa;     // "avx512"
  std::string dtype;   // of q and out
  std::string kv_dtype;
  int min_head_dim, max_head_dim;
  std::string features;  // "causal window softcap ..."
  bool available;        // on this machine
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;
  virtual DeviceInfo device_info(int index) const = 0;
  // The backend's kernels in order of preference, each with the reason that rules it out.
  virtual std::vector<Candidate> candidates(const AttentionDesc& desc,
                                            const DeviceInfo& device) const = 0;
  virtual PlanTraits plan_traits(const AttentionDesc& desc, const DeviceInfo& device) const = 0;
  // What the backend keeps with a plan (AttentionPlan::on_device), or null.
  virtual std::shared_ptr<void> prepare(const AttentionDesc& desc, const AttentionPlan& plan,
                                        Device device) const = 0;
  // What plan_on_device() keeps with a plan; `batch` points into the memory of stream.device.
  virtual std::shared_ptr<void> plan_on_device(const AttentionDesc&, const AttentionBatch&,
                                               int /*max_total_q*/, const Stream&) const {
    throw Unsupported(std::string("plan: ") + name() + " plans of lengths on the host only");
  }
  // Arguments of the functions below have been validated. Index arrays (slots, positions, block
  // pairs) may lie on the host whatever the backend; on the device their values are not checked.
  virtual size_t workspace_size(const AttentionDesc& desc, const AttentionPlan& plan) const = 0;
  virtual void run(const AttentionPlan& plan, const AttentionParams& params,
                   const Stream& stream) const = 0;
  // What a backend need not have throws Unsupported. Inline, as all of this class: a backend in a
  // library of its own takes no symbol from this one.
  //
  // One of the `nth` parts of a run whose counters are in `workspace`; see Attention::run_part.
  virtual void run_part(const AttentionPlan&, const AttentionParams&, std::span<std::byte>,
                        int) const {
    throw Unsupported(std::string("run_part: not implemented on ") + name() +
                      ": only the CPU has parts");
  }
  virtual void attention_backward(const BackwardParams&) const {
    throw Unsupported(std::string("attention_backward: the backend ") + name() +
                      " has no kernel for it");
  }
  virtual void append_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache,
                         const TensorView& v_cache, const TensorView& slot_mapping,
                         const Rope* rope, const KvScales& scales, const Stream& stream) const = 0;
  virtual void apply_rope(const TensorView& x, const Rope& rope, const TensorView& out,
                          const Stream& stream) const = 0;
  virtual void copy_blocks(const TensorView& k_cache, const TensorView& v_cache,
                           const TensorView& src_dst, const Stream& stream) const = 0;
  virtual void swap_blocks(const TensorView& src, const TensorView& dst, const TensorView& src_dst,
                           const Stream& stream) const = 0;
  virtual void merge_states(const TensorView& outs, const TensorView& lses, const TensorView& out,
                            const TensorView& lse, const Stream& stream) const = 0;
  virtual std::vector<Capability> capabilities() const = 0;
};

Backend* cpu_backend();
Backend* cuda_backend();   // null where quire was built without CUDA or no device can be used;
                           // the first call loads libquire_cuda.so and starts the driver
std::string cuda_state();  // one plain sentence: "built without CUDA", "no CUDA driver: ...", ...

// The backend of a device, or null.
Backend* backend_of(DeviceType type);
std::vector<Capability> capabilities();

// CPU instruction set in use: "scalar"; x86-64: "avx2", "avx512", "avx512_bf16", "avx512_amx";
// AArch64: "neon", "neon_bf16". The environment variable QUIRE_CPU_ISA forces one; an unknown or
// unsupported name is refused with the list.
std::string cpu_isa();
std::vector<std::string> supported_cpu_isas();  // best first
int num_threads();
void set_num_threads(int count);  // >= 1

}  // namespace quire
