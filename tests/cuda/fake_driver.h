// SPDX-License-Identifier: Apache-2.0
// A CUDA driver that a test has written: it counts what is called, keeps what is launched, and its
// device memory is the host's. Streams run at once, unless a test holds their events back.
#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "emulator/tensor_map.h"
#include "host/driver.h"

namespace quire::cuda {

struct FakeGpu {
  int major, minor, multiprocessors;
  int attributes_set = 0;
};

struct FakeLaunch {
  std::string kernel;
  unsigned blocks, threads, shared_bytes;
  Handle stream;
  Handle context;  // current when it was launched
  void* args;      // valid during on_launch only
};

// The one driver of a test at a time.
class FakeDriver {
 public:
  FakeDriver() { current() = this; }
  ~FakeDriver() {
    for (void* memory : memory_) std::free(memory);
  }
  FakeDriver(const FakeDriver&) = delete;

  static Driver table();

  // What the driver is like.
  int version = 13000;
  int init_result = kSuccess;
  std::vector<FakeGpu> gpus = {{9, 0, 132}};
  std::map<std::string, int> failing;  // symbol -> result
  bool events_have_passed = true;
  uint64_t capture = 0;  // id of the capture that all streams take part in; 0: none
  std::set<const void*> pinned;
  bool all_is_pinned = false;
  std::function<void(const FakeLaunch&)> on_launch = [](const FakeLaunch&) {};

  // What has happened.
  std::map<std::string, int> calls;  // by symbol
  std::vector<FakeLaunch> launches;
  std::map<std::string, int> shared_limits;  // of functions, as set
  std::map<Handle, int> copies;              // by stream

  int count(const char* symbol) { return calls.count(symbol) ? calls[symbol] : 0; }

 private:
  static FakeDriver*& current() {
    static FakeDriver* driver = nullptr;
    return driver;
  }

  // Counts the call; `body` runs unless the test wants the call to fail.
  template <class Body>
  static int call(const char* symbol, Body body) {
    FakeDriver& self = *current();
    std::lock_guard lock(self.mutex_);
    ++self.calls[symbol];
    if (const auto it = self.failing.find(symbol); it != self.failing.end()) return it->second;
    body(self);
    return kSuccess;
  }

  void* allocate(size_t bytes) {
    memory_.push_back(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    std::memset(memory_.back(), 0xFF, bytes);  // NaN, -1: whatever was there before
    return memory_.back();
  }
  // A handle that is a name.
  Handle name_handle(const std::string& name) {
    return const_cast<std::string*>(&*names_.insert(name).first);
  }
  static Handle context_handle(int device) { return reinterpret_cast<Handle>(0x1000 + device); }
  static std::vector<Handle>& contexts() {
    thread_local std::vector<Handle> stack;
    return stack;
  }

  std::recursive_mutex mutex_;
  std::vector<void*> memory_;
  std::set<std::string> names_;
};

inline Driver FakeDriver::table() {
  Driver d;
  d.init = [](unsigned) { return call("cuInit", [](FakeDriver&) {}) + current()->init_result; };
  d.driver_version = [](int* version) {
    return call("cuDriverGetVersion", [&](FakeDriver& f) { *version = f.version; });
  };
  d.error_name = [](int result, const char** name) {
    *name = result == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER";
    return 0;
  };
  d.device_count = [](int* count) {
    return call("cuDeviceGetCount",
                [&](FakeDriver& f) { *count = static_cast<int>(f.gpus.size()); });
  };
  d.device_name = [](char* name, int, int) {
    std::strcpy(name, "Fake GPU");
    return 0;
  };
  d.device_attribute = [](int* value, int attribute, int device) {
    return call("cuDeviceGetAttribute", [&](FakeDriver& f) {
      const FakeGpu& gpu = f.gpus[device];
      *value = attribute == kMajor   ? gpu.major
               : attribute == kMinor ? gpu.minor
                                     : gpu.multiprocessors;
    });
  };
  d.retain_context = [](Handle* context, int device) {
    return call("cuDevicePrimaryCtxRetain",
                [&](FakeDriver&) { *context = context_handle(device); });
  };
  d.current_context = [](Handle* context) {
    *context = contexts().empty() ? nullptr : contexts().back();
    return 0;
  };
  d.push_context = [](Handle context) {
    return call("cuCtxPushCurrent", [&](FakeDriver&) { contexts().push_back(context); });
  };
  d.pop_context = [](Handle* context) {
    return call("cuCtxPopCurrent", [&](FakeDriver&) {
      *context = contexts().back();
      contexts().pop_back();
    });
  };
  d.load_library = [](Handle* library, const void* image, Handle, Handle, unsigned, Handle, Handle,
                      unsigned) {
    return call("cuLibraryLoadData", [&](FakeDriver&) { *library = const_cast<void*>(image); });
  };
  d.library_kernel = [](Handle* kernel, Handle, const char* name) {
    return call("cuLibraryGetKernel", [&](FakeDriver& f) { *kernel = f.name_handle(name); });
  };
  d.kernel_function = [](Handle* function, Handle kernel) {
    return call("cuKernelGetFunction", [&](FakeDriver&) { *function = kernel; });
  };
  d.set_attribute = [](Handle function, int attribute, int value) {
    return call("cuFuncSetAttribute", [&](FakeDriver& f) {
      if (attribute == kMaxDynamicSharedBytes)
        f.shared_limits[*static_cast<std::string*>(function)] = value;
    });
  };
  d.launch = [](Handle function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                unsigned, unsigned shared_bytes, Handle stream, void** arguments, void**) {
    return call("cuLaunchKernel", [&](FakeDriver& f) {
      const FakeLaunch launch{*static_cast<std::string*>(function),
                              x * y * z,
                              threads,
                              shared_bytes,
                              stream,
                              contexts().empty() ? nullptr : contexts().back(),
                              arguments[0]};
      f.launches.push_back(launch);
      f.on_launch(launch);
    });
  };
  d.allocate = [](DeviceAddress* address, size_t bytes) {
    return call("cuMemAlloc", [&](FakeDriver& f) {
      *address = reinterpret_cast<DeviceAddress>(f.allocate(bytes));
    });
  };
  d.allocate_pinned = [](void** memory, size_t bytes, unsigned) {
    return call("cuMemHostAlloc", [&](FakeDriver& f) { *memory = f.allocate(bytes); });
  };
  d.copy_to_device = [](DeviceAddress to, const void* from, size_t bytes, Handle stream) {
    return call("cuMemcpyHtoDAsync", [&](FakeDriver& f) {
      ++f.copies[stream];
      std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    });
  };
  d.pointer_attribute = [](void* value, int, DeviceAddress pointer) {
    bool known = false;
    call("cuPointerGetAttribute", [&](FakeDriver& f) {
      known = f.all_is_pinned || f.pinned.count(reinterpret_cast<void*>(pointer)) > 0;
    });
    if (known) std::memcpy(value, &pointer, sizeof pointer);
    return known ? kSuccess : 1;
  };
  d.create_event = [](Handle* event, unsigned) {
    return call("cuEventCreate", [&](FakeDriver& f) { *event = f.name_handle("event"); });
  };
  d.record_event = [](Handle, Handle) { return call("cuEventRecord", [](FakeDriver&) {}); };
  d.query_event = [](Handle) {
    const int result = call("cuEventQuery", [](FakeDriver&) {});
    return result != kSuccess || current()->events_have_passed ? result : kNotReady;
  };
  d.exchange_capture_mode = [](int*) { return 0; };
  d.capture_info = [](Handle, int* status, uint64_t* id) {
    return call("cuStreamGetCaptureInfo", [&](FakeDriver& f) {
      *status = f.capture != 0 ? kCaptureActive : 0;
      *id = f.capture;
    });
  };
  d.encode_tensor_map = [](void* map, int type, unsigned rank, void* base, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                           int interleave, int swizzle, int, int fill) {
    bool is_valid = type == kUInt16 && rank == 4 && interleave == kNoInterleave &&
                    swizzle == kSwizzle128 && fill == kFillZeros;
    for (int i = 0; i < 4; ++i) is_valid &= steps[i] == 1;
    const int result = call("cuTensorMapEncodeTiled", [&](FakeDriver&) {
      is_valid = is_valid && emulator::encode_tensor_map(map, base, dims, strides, box);
    });
    return result != kSuccess || is_valid ? result : 1;
  };
  return d;
}

}  // namespace quire::cuda
