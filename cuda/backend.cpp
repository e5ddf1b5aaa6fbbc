// SPDX-License-Identifier: Apache-2.0
// The CUDA backend: work lists and cache operations as kernel launches. Nothing here waits for the
// device.
#include "backend.h"

#include <algorithm>
#include <vector>

#include "host/arch.h"
#include "host/boxes.h"
#include "host/cache_ops.h"
#include "host/device_plan.h"
#include "host/plan_memory.h"
#include "host/select.h"
#include "quire/error.h"

namespace quire::cuda {
namespace {

constexpr const char* kFeatures = "dense ragged paged causal window softcap alibi sinks mask lse";
constexpr const char* kLatentFeatures =  // v = k[..., :head_dim_v]
    "dense ragged paged causal window softcap alibi sinks mask lse latent";
constexpr const char* kQuantisedFeatures =
    "paged causal window softcap alibi sinks mask lse scales";

// Rows of q, k, v and out begin at multiples of 16 bytes.
bool is_aligned(const AttentionParams& p) {
  for (const void* pointer : {p.q, p.k, p.v, static_cast<const void*>(p.out)})
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  const int q_piece =
      p.dtype == ElementType::kFloat8E4M3 ? device::kPieceBytes : device::kPieceBytes / 2;
  for (const int64_t stride : {p.q_stride_seq, p.q_stride_row, p.q_stride_head})
    if (stride % q_piece != 0) return false;
  for (const int64_t stride : {p.out_stride_seq, p.out_stride_row, p.out_stride_head})
    if (stride % device::kPiece != 0) return false;
  const bool has_codes = p.kv_dtype == ElementType::kFloat8E4M3;
  for (const int64_t stride : {p.k_stride_seq, p.k_stride_block, p.k_stride_row, p.k_stride_head,
                               p.v_stride_seq, p.v_stride_block, p.v_stride_row, p.v_stride_head})
    if (stride % (has_codes ? 2 * device::kPiece : device::kPiece) != 0) return false;
  return true;
}

device::Mode mode_of(const AttentionParams& p, bool aligned) {
  const bool is_plain = p.scale > 0 && p.softcap == 0 && !p.alibi_slopes && !p.mask;
  return is_plain && aligned ? device::Mode::kFast : device::Mode::kFull;
}

// What V has to be for kernels that read K alone.
void check_latent(const AttentionParams& p) {
  const bool same_rows = p.v_stride_seq == p.k_stride_seq && p.v_stride_block == p.k_stride_block &&
                         p.v_stride_row == p.k_stride_row &&
                         (p.num_kv_heads == 1 || p.v_stride_head == p.k_stride_head);
  if (p.v != p.k || !same_rows)
    throw Unsupported(concat("attention: v: head_dim ", p.head_dim,
                             " is implemented where v is the first columns of k, the same memory: "
                             "v = k[..., :",
                             p.head_dim_v, "]; got other memory or other strides"));
}

// Tensor maps of K and V for boxes of at most `most` rows. Where the driver takes the tensors for
// none, the kernel gathers rows.
void set_boxes(const Driver& driver, int most, device::BoxedAttentionArgs& args) {
  const AttentionParams& p = args.attention.params;
  args.box_rows = box_rows(p, args.attention.is_aligned, most);
  if (args.box_rows == 0) return;
  for (const bool is_k : {true, false}) {
    const BoxedTensor tensor = boxed_tensor(p, is_k, args.box_rows);
    const uint32_t steps[] = {1, 1, 1, 1};
    const int result = driver.encode_tensor_map(
        is_k ? &args.k : &args.v, kUInt16, 4, const_cast<void*>(tensor.base), tensor.dims,
        tensor.strides, tensor.box, steps, kNoInterleave, kSwizzle128, kL2Promotion256, kFillZeros);
    if (result != kSuccess) args.box_rows = 0;
  }
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(const Driver& driver, const Images& images, int count) : images_(images) {
    for (int i = 0; i < count; ++i) gpus_.push_back(std::make_unique<Gpu>(driver, images, i));
  }

  std::string describe() const {
    std::string text = concat(gpus_.size(), gpus_.size() == 1 ? " device: " : " devices: ");
    for (const auto& gpu : gpus_)
      text += concat(gpu == gpus_.front() ? "" : ", ", gpu->name(), " (", gpu->info().isa, ")");
    return text;
  }

  const char* name() const override { return "cuda"; }

  DeviceInfo device_info(int index) const override { return gpu(index).info(); }

  std::vector<Candidate> candidates(const AttentionDesc& desc,
                                    const DeviceInfo& device) const override {
    return cuda::candidates(desc, device.isa, images_.archs);
  }

  PlanTraits plan_traits(const AttentionDesc& desc, const DeviceInfo& device) const override {
    return {device.parallelism, select(desc, device.isa).max_rows()};
  }

  std::shared_ptr<void> prepare(const AttentionDesc& desc, const AttentionPlan& plan,
                                Device device) const override {
    return std::shared_ptr<PlanOnGpu>(std::make_shared<SentPlan>(gpu(device.index), desc, plan));
  }

  std::shared_ptr<void> plan_on_device(const AttentionDesc& desc, const AttentionBatch& batch,
                                       int max_total_q, const Stream& stream) const override {
    return std::shared_ptr<PlanOnGpu>(std::make_shared<DevicePlan>(
        gpu(stream.device.index), desc, batch, max_total_q, stream.handle));
  }

  size_t workspace_size(const AttentionDesc&, const AttentionPlan& plan) const override {
    const auto* on_gpu = static_cast<const PlanOnGpu*>(plan.on_device.get());
    QUIRE_CHECK_ARG(on_gpu,
                    "workspace_size: plan: expected one that plan() of an Attention for a "
                    "GPU has made");
    return on_gpu->bytes();
  }

  void run(const AttentionPlan& plan, const AttentionParams& params,
           const Stream& stream) const override {
    auto* on_gpu = static_cast<PlanOnGpu*>(plan.on_device.get());
    QUIRE_CHECK_ARG(
        on_gpu && on_gpu->gpu().info().device == stream.device && on_gpu->was_made_for(params),
        "attention: plan: expected one that plan() of this Attention has made for ",
        to_string(stream.device));
    if (on_gpu->kernels().is_latent()) check_latent(params);
    Gpu& gpu = on_gpu->gpu();
    const ContextScope scope(gpu);
    device::BoxedAttentionArgs boxed{};
    device::AttentionArgs& args = boxed.attention;
    args.params = params;
    args.params.sequences = nullptr;  // they are with the items
    args.is_aligned = is_aligned(params);
    on_gpu->use(stream.handle, args);
    const auto mode = static_cast<int>(mode_of(params, args.is_aligned));
    const device::ListedItem* items = args.items;
    const device::ItemRange* ranges = args.range;
    for (const PlanOnGpu::Segment& segment : on_gpu->segments()) {
      args.items = items + segment.first;
      args.num_items = segment.count;
      args.item_rows = segment.rows;
      args.range = ranges ? ranges + segment.phase : nullptr;
      const Kernel& kernel = *on_gpu->kernels().kernels[segment.phase][mode];
      if (kernel.box_rows > 0) set_boxes(gpu.driver(), kernel.box_rows, boxed);
      gpu.launch(kernel, segment.blocks, &boxed, stream.handle);
    }
  }

  void append_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache,
                 const TensorView& v_cache, const TensorView& slot_mapping, const Rope* rope,
                 const KvScales& scales, const Stream& stream) const override {
    if (is_quantised(k_cache.dtype) && k_cache.dtype != DType::kFloat8E4M3)
      throw Unsupported(concat("append_kv: k_cache: no CUDA kernel writes ", name_of(k_cache.dtype),
                               " caches; expected float16, bfloat16 or float8_e4m3"));
    cuda::append_kv(gpu(stream.device.index), k, v, k_cache, v_cache, slot_mapping, rope, scales,
                    stream.handle);
  }

  void apply_rope(const TensorView& x, const Rope& rope, const TensorView& out,
                  const Stream& stream) const override {
    cuda::apply_rope(gpu(stream.device.index), x, rope, out, stream.handle);
  }

  void copy_blocks(const TensorView& k_cache, const TensorView& v_cache, const TensorView& src_dst,
                   const Stream& stream) const override {
    cuda::copy_blocks(gpu(stream.device.index), k_cache, v_cache, src_dst, stream.handle);
  }

  void swap_blocks(const TensorView& src, const TensorView& dst, const TensorView& src_dst,
                   const Stream& stream) const override {
    cuda::swap_blocks(gpu(stream.device.index), src, dst, src_dst, stream.handle);
  }

  void merge_states(const TensorView& outs, const TensorView& lses, const TensorView& out,
                    const TensorView& lse, const Stream& stream) const override {
    cuda::merge_states(gpu(stream.device.index), outs, lses, out, lse, stream.handle);
  }

  std::vector<Capability> capabilities() const override {
    std::vector<Capability> rows;
    std::istringstream archs(images_.archs);
    for (std::string arch; archs >> arch;) {
      const bool available = std::any_of(gpus_.begin(), gpus_.end(),
                                         [&](const auto& gpu) { return gpu->arch() == arch; });
      for (const DType dtype : {DType::kFloat16, DType::kBFloat16})
        for (const DType kv : {dtype, DType::kFloat8E4M3})
          if (const auto dims = head_dims(element_type(kv)); !dims.empty()) {
            const auto add = [&](int least, int most, const char* features) {
              rows.push_back({"cuda", "sm_" + arch, name_of(dtype), name_of(kv), least, most,
                              features, available});
            };
            const int most = max_head_dim(kv);
            add(1, most, is_quantised(kv) ? kQuantisedFeatures : kFeatures);
            if (dims.back() > most) add(most + 1, dims.back(), kLatentFeatures);
          }
      const DType codes = DType::kFloat8E4M3;
      int most = 0;
      for (const int dim : head_dims(element_type(codes)))
        if (kernels_for(element_type(codes), element_type(codes), dim, dim, "sm_" + arch)
                .is_complete())
          most = dim;
      if (most > 0)
        rows.push_back({"cuda", "sm_" + arch, name_of(codes), name_of(codes), 1, most,
                        kQuantisedFeatures, available});
    }
    return rows;
  }

 private:
  Gpu& gpu(int index) const {
    QUIRE_CHECK_ARG(index >= 0 && index < static_cast<int>(gpus_.size()),
                    "device: expected the index of a GPU in [0, ", gpus_.size(), "), got ", index);
    return *gpus_[index];
  }

  const Images& images_;
  std::vector<std::unique_ptr<Gpu>> gpus_;
};

}  // namespace

Made make_backend(const Driver& driver, const Images& images) {
  Made made;
  const int count = start(driver, made.state);
  if (count == 0) return made;
  try {
    auto backend = std::make_unique<CudaBackend>(driver, images, count);
    made.state = backend->describe();
    made.backend = std::move(backend);
  } catch (const CudaError& error) {
    made.state = concat("CUDA does not start: ", error.what());
  }
  return made;
}

}  // namespace quire::cuda
