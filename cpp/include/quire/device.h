// SPDX-License-Identifier: Apache-2.0
// Where memory lives, and what the planner and the dispatcher may know of the machine there.
#pragma once

#include <cstdint>
#include <string>

namespace quire {

enum class DeviceType : uint8_t { kCPU, kCUDA };

struct Device {
  DeviceType type = DeviceType::kCPU;
  int index = 0;
  bool operator==(const Device&) const = default;
};

inline std::string to_string(Device device) {
  return device.type == DeviceType::kCPU ? "cpu" : "cuda:" + std::to_string(device.index);
}

// Where a backend puts work. The CPU has no streams: its work is done when the call returns. On a
// GPU work is done in the order of its stream, and no call waits for it.
struct Stream {
  Device device;
  void* handle = nullptr;  // a cudaStream_t; null: the device's default stream
};

// A plain value: `dispatch` and `plan` take it as an argument, so the decisions for any machine
// can be tested on any other.
struct DeviceInfo {
  Device device;
  std::string isa;      // CPU: see supported_cpu_isas(); CUDA: "sm_90"
  int parallelism = 1;  // CPU: threads; CUDA: streaming multiprocessors
};

}  // namespace quire
