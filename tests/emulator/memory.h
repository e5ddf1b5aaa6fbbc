// SPDX-License-Identifier: Apache-2.0
// SharedMemory: the bytes of one block, reached by checked 32-bit addresses only.
// GlobalMemory: which ranges of host memory a kernel may touch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/async.h"
#include "emulator/race.h"

namespace quire::emulator {

class SharedMemory {
 public:
  SharedMemory(int num_threads, size_t bytes, bool check_races)
      : bytes_(bytes, kPoison),
        in_flight_((bytes + 3) / 4, 0),
        generic_((bytes + 3) / 4),
        proxy_fences_(num_threads, 1),
        races_(num_threads, check_races ? bytes : 0),
        check_races_(check_races) {}

  uint8_t* data() { return bytes_.data(); }
  RaceDetector& races() { return races_; }

  // What is wrong with an access of `bytes` bytes, each lane's address aligned to `alignment`; or
  // an empty string.
  std::string check(int thread, uint32_t address, uint32_t bytes, uint32_t alignment, bool write) {
    if (size_t{address} + bytes > bytes_.size())
      return "shared bytes [" + std::to_string(address) + ", " + std::to_string(address + bytes) +
             ") of " + std::to_string(bytes_.size());
    if (address % alignment != 0)
      return "shared address " + std::to_string(address) + " is not aligned to " +
             std::to_string(alignment) + " bytes";
    if (std::string error = check_in_flight(address, bytes); !error.empty()) return error;
    if (write) wrote(thread, address, bytes);
    if (!check_races_) return {};
    return write ? races_.write(thread, address, bytes) : races_.read(thread, address, bytes);
  }

  // Likewise of tensor cores, which read 16 bytes for the warps of the `leaders`.
  std::string check_product(int first_leader, uint32_t address) {
    if (size_t{address} + 16 > bytes_.size())
      return "shared byte " + std::to_string(address) + " of " + std::to_string(bytes_.size());
    if (std::string error = check_in_flight(address, 16); !error.empty()) return error;
    if (std::string error = check_proxy(address, 16); !error.empty()) return error;
    for (int warp = 0; warp < 4 && check_races_; ++warp)
      if (std::string error = races_.read(first_leader + 32 * warp, address, 16); !error.empty())
        return error;
    return {};
  }

  // Likewise of a bulk copy by `agent` that `thread` issues.
  std::string check_bulk(int agent, int thread, uint32_t address, uint32_t bytes) {
    if (size_t{address} + bytes > bytes_.size() || address % 128 != 0)
      return "destination " + std::to_string(address) + " of " + std::to_string(bytes_.size()) +
             ", expected a multiple of 128";
    if (std::string error = check_in_flight(address, bytes); !error.empty()) return error;
    if (std::string error = check_proxy(address, bytes); !error.empty()) return error;
    return check_races_ ? races_.write_by_agent(agent, thread, address, bytes) : "";
  }

  // The thread's own stores and copies are seen by tensor cores and bulk copies only after it has
  // fenced them.
  void wrote(int thread, uint32_t address, uint32_t bytes) {
    for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i)
      generic_[i] = {static_cast<uint16_t>(thread), proxy_fences_[thread]};
  }
  void fence_proxy(int thread) { ++proxy_fences_[thread]; }

  // A copy by `thread` is on its way: nobody may touch its destination.
  void set_in_flight(int thread, uint32_t address, uint32_t bytes, bool value) {
    for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i)
      in_flight_[i] = static_cast<uint16_t>(value ? thread + 1 : 0);
  }

 private:
  // The latest store to a word by a thread, and how often it had fenced: 0, none.
  struct GenericWrite {
    uint16_t thread = 0;
    uint32_t fences = 0;
  };

  std::string check_in_flight(uint32_t address, uint32_t bytes) const {
    for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i)
      if (in_flight_[i])
        return "shared byte " + std::to_string(i * 4) +
               " is touched while a copy to it is in flight, issued by thread " +
               std::to_string(in_flight_[i] - 1);
    return {};
  }
  std::string check_proxy(uint32_t address, uint32_t bytes) const {
    for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i)
      if (generic_[i].fences != 0 && generic_[i].fences == proxy_fences_[generic_[i].thread])
        return "shared byte " + std::to_string(i * 4) + " was written by thread " +
               std::to_string(generic_[i].thread) + " without fence.proxy.async since";
    return {};
  }

  std::vector<uint8_t> bytes_;
  std::vector<uint16_t> in_flight_;     // by word: 1 + the thread whose copy is in flight, or 0
  std::vector<GenericWrite> generic_;   // by word
  std::vector<uint32_t> proxy_fences_;  // by thread
  RaceDetector races_;
  bool check_races_;
};

class GlobalMemory {
 public:
  // While no range is allowed, all are: then AddressSanitizer is the judge.
  void allow(const void* begin, size_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(begin);
    if (bytes > 0) ranges_.push_back({address, address + bytes});
  }

  bool allows_all() const { return ranges_.empty(); }

  std::string check(const void* pointer, size_t bytes, size_t alignment) const {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address % alignment != 0)
      return "global address is not aligned to " + std::to_string(alignment) + " bytes";
    const auto holds = [=](const Range& range) {
      return address >= range.begin && address + bytes <= range.end;
    };
    if (allows_all() || std::any_of(ranges_.begin(), ranges_.end(), holds)) return {};
    return "global access of " + std::to_string(bytes) + " bytes outside of every tensor";
  }

 private:
  struct Range {
    uintptr_t begin, end;
  };
  std::vector<Range> ranges_;
};

}  // namespace quire::emulator
