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
    for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i)
      if (in_flight_[i])
        return "shared byte " + std::to_string(i * 4) +
               " is touched while a copy to it is in flight, issued by thread " +
               std::to_string(in_flight_[i] - 1);
    if (!check_races_) return {};
    return write ? races_.write(thread, address, bytes) : races_.read(thread, address, bytes);
  }

  // A copy by `thread` is on its way: nobody may touch its destination.
  void set_in_flight(int thread, uint32_t address, uint32_t bytes, bool value) {
    for (uint32_t i = address / 4; i <= (address + bytes - 1) / 4; ++i)
      in_flight_[i] = static_cast<uint16_t>(value ? thread + 1 : 0);
  }

 private:
  std::vector<uint8_t> bytes_;
  std::vector<uint16_t> in_flight_;  // by word: 1 + the thread whose copy is in flight, or 0
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
