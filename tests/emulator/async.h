// SPDX-License-Identifier: Apache-2.0
// AsyncCopies: the cp.async copies of one thread. Hardware may perform a copy at any time between
// issue and wait, so the emulator chooses the worst: late, early, or at random. Until the wait
// the destination counts as in flight, and a copy that has not landed yet leaves NaN there.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <random>
#include <utility>
#include <vector>

namespace quire::emulator {

enum class AsyncMode { kLazy, kEager, kRandom };

inline constexpr int kPoison = 0xFF;  // a NaN in every floating type when all bytes hold it

class AsyncCopies {
 public:
  struct Copy {
    uint32_t destination;  // shared address
    const void* source;
    uint32_t bytes;
    uint32_t valid;  // bytes to read; the rest is zero
    bool landed;
  };

  void issue(uint8_t* shared, Copy copy, AsyncMode mode, std::minstd_rand& random) {
    copy.landed = mode == AsyncMode::kEager || (mode == AsyncMode::kRandom && random() % 2 == 0);
    if (copy.landed) {
      land(shared, copy);
    } else {
      std::memset(shared + copy.destination, kPoison, copy.bytes);
    }
    open_.push_back(copy);
  }

  void commit() { groups_.push_back(std::exchange(open_, {})); }

  // Completes all but the latest `allowed` groups; `done(copy)` is called for each copy.
  template <class Done>
  void wait(uint8_t* shared, size_t allowed, Done done) {
    while (groups_.size() > allowed) {
      for (Copy& copy : groups_.front()) {
        if (!copy.landed) land(shared, copy);
        done(copy);
      }
      groups_.pop_front();
    }
  }

  bool idle() const {
    if (!open_.empty()) return false;
    for (const auto& group : groups_)
      if (!group.empty()) return false;
    return true;
  }

 private:
  static void land(uint8_t* shared, const Copy& copy) {
    if (copy.valid > 0) std::memcpy(shared + copy.destination, copy.source, copy.valid);
    std::memset(shared + copy.destination + copy.valid, 0, copy.bytes - copy.valid);
  }

  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace quire::emulator
