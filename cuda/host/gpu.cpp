// SPDX-License-Identifier: Apache-2.0
#include "host/gpu.h"

#include <algorithm>
#include <bit>

#include "host/arch.h"
#include "quire/error.h"

namespace quire::cuda {
namespace {

// Generous, so that few slabs serve all: sizes of a step's lists change from step to step.
size_t slab_size(size_t bytes) { return std::bit_ceil(std::max<size_t>(bytes, 1 << 14)); }

// The image that holds a kernel: see cuda/CMakeLists.txt.
std::string image_of(const Kernel& kernel) {
  const char* codes = kernel.kv_dtype == ElementType::kFloat8E4M3 ? "e4m3_" : "";
  if (kernel.latent_dim > 0) return concat("mla_decode_", kernel.head_dim);
  if (kernel.arch) return concat("prefill_sm90_", codes, kernel.head_dim);
  if (kernel.family == Family::kPrefill) return concat("prefill_", codes, kernel.head_dim);
  if (kernel.family == Family::kDecode) return concat("decode_", codes, kernel.head_dim);
  return "cache_ops";
}

}  // namespace

Gpu::Gpu(const Driver& driver, const Images& images, int index)
    : driver_(driver), images_(images), libraries_(images.end - images.begin) {
  int major = 0, minor = 0, multiprocessors = 0;
  const auto attribute = [&](int* value, int which) {
    check(driver, driver.device_attribute(value, which, index), "cuDeviceGetAttribute");
  };
  attribute(&major, kMajor), attribute(&minor, kMinor);
  attribute(&multiprocessors, kMultiprocessors);
  char name[256] = {};
  check(driver, driver.device_name(name, sizeof name, index), "cuDeviceGetName");
  name_ = name;
  info_ = {{DeviceType::kCUDA, index}, concat("sm_", major, minor), multiprocessors};
  arch_ = serving_arch(images.archs, info_.isa);
}

Handle Gpu::context() const {
  if (const Handle context = context_.load(std::memory_order_acquire)) return context;
  std::lock_guard lock(context_mutex_);
  if (!context_.load()) {
    Handle context = nullptr;  // the one that every framework shares
    check(driver_, driver_.retain_context(&context, info_.device.index),
          "cuDevicePrimaryCtxRetain");
    context_.store(context, std::memory_order_release);
  }
  return context_.load();
}

Handle Gpu::function(const Kernel& kernel) {
  std::atomic<Handle>& slot = functions_[&kernel - kKernels];
  if (const Handle function = slot.load(std::memory_order_acquire)) return function;
  std::lock_guard lock(mutex_);
  if (!slot.load()) slot.store(load(kernel), std::memory_order_release);
  return slot.load();
}

Handle Gpu::load(const Kernel& kernel) {
  const CaptureAllowance allowance(driver_);
  const std::string wanted = image_of(kernel);
  const Image* image = std::find_if(images_.begin, images_.end,
                                    [&](const Image& one) { return one.name == wanted; });
  QUIRE_INVARIANT(image != images_.end, "cuda: no image holds ", kernel.name);
  Handle& library = libraries_[image - images_.begin];
  if (!library)
    check(driver_,
          driver_.load_library(&library, image->data, nullptr, nullptr, 0, nullptr, nullptr, 0),
          "cuLibraryLoadData", wanted.c_str());
  Handle in_library = nullptr, function = nullptr;
  check(driver_, driver_.library_kernel(&in_library, library, kernel.name), "cuLibraryGetKernel",
        kernel.name);
  check(driver_, driver_.kernel_function(&function, in_library), "cuKernelGetFunction",
        kernel.name);
  if (kernel.shared_bytes > 0)
    check(driver_, driver_.set_attribute(function, kMaxDynamicSharedBytes, kernel.shared_bytes),
          "cuFuncSetAttribute", kernel.name);
  return function;
}

void Gpu::launch(const Kernel& kernel, int64_t blocks, void* args, Handle stream) {
  void* arguments[] = {args};
  check(driver_,
        driver_.launch(function(kernel), static_cast<unsigned>(blocks), 1, 1,
                       static_cast<unsigned>(kernel.threads), 1, 1,
                       static_cast<unsigned>(kernel.shared_bytes), stream, arguments, nullptr),
        "cuLaunchKernel", kernel.name);
}

int64_t Gpu::blocks_for(int64_t count, int threads) const {
  constexpr int kBlocksPerMultiprocessor = 16;
  return std::min<int64_t>((count + threads - 1) / threads,
                           int64_t{info_.parallelism} * kBlocksPerMultiprocessor);
}

Slab* Gpu::acquire(size_t host_bytes, size_t device_bytes) {
  const CaptureAllowance allowance(driver_);
  std::lock_guard lock(mutex_);
  for (auto it = free_slabs_.begin(); it != free_slabs_.end(); ++it) {
    Slab* slab = *it;
    if (slab->host_bytes < host_bytes || slab->device_bytes < device_bytes) continue;
    if (slab->is_in_use && driver_.query_event(slab->event) != kSuccess) continue;
    slab->is_in_use = false;
    free_slabs_.erase(it);
    return slab;
  }
  slabs_.push_back(make_slab(slab_size(host_bytes), slab_size(device_bytes)));
  return slabs_.back().get();
}

std::unique_ptr<Slab> Gpu::make_slab(size_t host_bytes, size_t device_bytes) {
  auto slab = std::make_unique<Slab>();
  slab->host_bytes = host_bytes;
  slab->device_bytes = device_bytes;
  check(driver_, driver_.create_event(&slab->event, kDisableTiming), "cuEventCreate");
  check(driver_, driver_.allocate_pinned(&slab->host, host_bytes, kPortable), "cuMemHostAlloc",
        std::to_string(host_bytes).c_str());
  check(driver_, driver_.allocate(&slab->device, device_bytes), "cuMemAlloc",
        std::to_string(device_bytes).c_str());
  return slab;
}

void Gpu::release(Slab* slab, Handle stream) {
  // Where the stream is gone nothing tells when its work has ended: the slab is never used again.
  const ContextScope scope(*this);
  if (driver_.record_event(slab->event, stream) != kSuccess) return;
  std::lock_guard lock(mutex_);
  slab->is_in_use = true;
  free_slabs_.push_back(slab);
}

void Gpu::release_unused(Slab* slab) {
  std::lock_guard lock(mutex_);
  free_slabs_.push_back(slab);
}

uint64_t Gpu::capture_of(Handle stream) const {
  int status = 0;
  uint64_t id = 0;
  const bool known = driver_.capture_info(stream, &status, &id) == kSuccess;
  return known && status == kCaptureActive ? id : 0;
}

ContextScope::ContextScope(const Gpu& gpu) : driver_(gpu.driver()) {
  Handle current = nullptr;
  check(driver_, driver_.current_context(&current), "cuCtxGetCurrent");
  if (current == gpu.context()) return;
  check(driver_, driver_.push_context(gpu.context()), "cuCtxPushCurrent");
  pushed_ = true;
}

ContextScope::~ContextScope() {
  Handle popped = nullptr;
  if (pushed_) driver_.pop_context(&popped);
}

}  // namespace quire::cuda
