// SPDX-License-Identifier: Apache-2.0
// One GPU: its context, its loaded kernels, and memory for what the host sends along with them.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "host/driver.h"
#include "host/registry.h"
#include "quire/device.h"

namespace quire::cuda {

// Pinned memory and its counterpart on the device. A slab is given back together with the stream
// that reads it, and given out again once that stream has passed this point.
struct Slab {
  void* host = nullptr;
  DeviceAddress device = 0;
  size_t host_bytes = 0, device_bytes = 0;
  Handle event = nullptr;
  bool is_in_use = false;  // an event is recorded that may not have passed
};

class Gpu {
 public:
  Gpu(const Driver& driver, const Images& images, int index);

  const DeviceInfo& info() const { return info_; }
  const std::string& name() const { return name_; }
  const std::string& arch() const { return arch_; }  // of the code it runs: "90a"; "" if none
  const Driver& driver() const { return driver_; }
  Handle context() const;  // made at first use, as it takes memory on the device

  // The kernel as this GPU's context has it, loaded and allowed its shared memory. Thread-safe.
  Handle function(const Kernel& kernel);
  void launch(const Kernel& kernel, int64_t blocks, void* args, Handle stream);
  // Enough blocks of `threads` for `count` units of work, and no more than fit at once by far.
  int64_t blocks_for(int64_t count, int threads) const;

  // Never waits: where no slab is free there is a new one.
  Slab* acquire(size_t host_bytes, size_t device_bytes);
  void release(Slab* slab, Handle stream);
  void release_unused(Slab* slab);

  // The id of the capture that the stream takes part in, or 0.
  uint64_t capture_of(Handle stream) const;

 private:
  Handle load(const Kernel& kernel);
  std::unique_ptr<Slab> make_slab(size_t host_bytes, size_t device_bytes);

  const Driver& driver_;
  const Images& images_;
  DeviceInfo info_;
  std::string name_, arch_;
  mutable std::mutex context_mutex_;
  mutable std::atomic<Handle> context_ = nullptr;  // retained at first use
  std::mutex mutex_;                               // of what follows
  std::vector<Handle> libraries_;
  std::atomic<Handle> functions_[std::size(kKernels)] = {};
  std::vector<std::unique_ptr<Slab>> slabs_;
  std::vector<Slab*> free_slabs_;
};

// Makes the GPU's context the calling thread's for a scope, where it is not already.
class ContextScope {
 public:
  explicit ContextScope(const Gpu& gpu);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

// While it lives, this thread may allocate and query although some stream is being captured. None
// of that touches the captured stream.
class CaptureAllowance {
 public:
  explicit CaptureAllowance(const Driver& driver) : driver_(driver) {
    driver_.exchange_capture_mode(&mode_);
  }
  ~CaptureAllowance() { driver_.exchange_capture_mode(&mode_); }
  CaptureAllowance(const CaptureAllowance&) = delete;

 private:
  const Driver& driver_;
  int mode_ = kRelaxedCapture;
};

}  // namespace quire::cuda
