// SPDX-License-Identifier: Apache-2.0
// What a block of compute capability 9.0 has besides its threads: mbarriers, bulk copies that
// complete on them, and matrix products of warpgroups, both running on their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "emulator/race.h"

namespace quire::emulator {

inline constexpr int kGroupThreads = 128;  // of a warpgroup

// A phase is complete when as many threads have arrived as were asked for and all bytes that they
// announced have come. Bytes may come before they are announced.
struct Mbarrier {
  uint32_t count = 0;
  uint32_t arrived = 0;
  int64_t missing_bytes = 0;
  bool parity = false;  // of the phase that is not complete yet
  int agent = 0;        // stands for the copies that complete here
  int initialiser = 0;
  bool is_fenced = false;         // its initialisation, for copies to see
  RaceDetector::Clock arriving;   // of those who have arrived in this phase
  RaceDetector::Clock completed;  // of the phases before

  bool is_complete() const { return arrived == count && missing_bytes == 0; }
};

// A product that a warpgroup has issued. Hardware may read its operands at any time until the wait,
// so that is what the emulator does: early or late. The sums are there after the wait.
struct PendingProduct {
  const void* sums;               // of the warpgroup's first thread
  std::function<void()> read;     // the operands; again: only checks that they may still be read
  std::function<void()> deliver;  // the sums
};

// Products of one warpgroup in order, by groups.
class MatrixQueue {
 public:
  void issue(PendingProduct product, bool read_now) {
    if (read_now) product.read();
    open_.push_back(std::move(product));
  }
  bool idle() const { return open_.empty() && groups_.empty(); }
  bool has_sums(const void* sums) const {
    const auto has = [sums](const std::vector<PendingProduct>& products) {
      return std::any_of(products.begin(), products.end(),
                         [sums](const PendingProduct& p) { return p.sums == sums; });
    };
    return has(open_) || std::any_of(groups_.begin(), groups_.end(), has);
  }
  void commit() { groups_.push_back(std::exchange(open_, {})); }
  void wait(size_t allowed) {
    while (groups_.size() > allowed) {
      for (const PendingProduct& product : groups_.front()) {
        product.read();
        product.deliver();
      }
      groups_.pop_front();
    }
  }

  // wgmma.fence orders registers before products: needed again after each wait.
  bool is_fenced = false;

 private:
  std::vector<PendingProduct> open_;
  std::deque<std::vector<PendingProduct>> groups_;
};

// One warpgroup: who waits in a collective, its products, its registers a thread.
struct Warpgroup {
  int arrived = 0;
  MatrixQueue products;
  int registers = 0;  // as setmaxnreg left them; 0: as at launch
};

struct NamedBarrier {
  std::vector<int> waiting;  // threads
  int arrived = 0;           // threads, those that wait among them
  int count = 0;
  RaceDetector::Clock arriving;

  // What is wrong, or null.
  const char* arrive(int thread, int of, bool waits) {
    if (arrived > 0 && count != of) return "threads that expect another number are waiting";
    count = of;
    if (waits) waiting.push_back(thread);
    if (++arrived == count && waiting.empty()) return "all have arrived and nobody waits";
    return nullptr;
  }
};

// Copies in flight: each lands when the block says so.
struct BulkCopies {
  std::vector<std::function<void()>> pending;

  // One of them: `choice` modulo how many there are.
  void land_any(size_t choice) {
    const auto it = pending.begin() + static_cast<std::ptrdiff_t>(choice % pending.size());
    const std::function<void()> copy = std::move(*it);
    pending.erase(it);
    copy();
  }
};

struct HopperState {
  std::map<uint32_t, Mbarrier> mbarriers;  // by shared address
  std::map<int, NamedBarrier> named;
  std::vector<Warpgroup> groups;
  BulkCopies bulk;

  // What is wrong, or null.
  const char* init_mbarrier(uint32_t address, uint32_t count, int thread) {
    const int agent = static_cast<int>(mbarriers.size());
    if (agent == RaceDetector::kMaxAgents) return "more mbarriers than the emulator knows";
    Mbarrier& barrier = mbarriers[address];
    if (barrier.count != 0) return "the mbarrier is in use";
    barrier.count = count;
    barrier.agent = agent;
    barrier.initialiser = thread;
    return nullptr;
  }
  void fence_mbarriers(int thread) {
    for (auto& [address, barrier] : mbarriers)
      if (barrier.initialiser == thread) barrier.is_fenced = true;
  }

  static int registers_at_launch(int num_threads) {
    return std::min(255, 65536 / num_threads) / 8 * 8;
  }

  // The registers of the launch are enough for what all warpgroups have asked for.
  bool registers_are_there(int num_threads) const {
    const int at_launch = registers_at_launch(num_threads);
    int total = 0;
    for (const Warpgroup& group : groups) {
      if (group.registers == 0) return true;  // it has not asked yet
      total += group.registers * kGroupThreads;
    }
    return total <= at_launch * num_threads;
  }

  bool has_products(int thread) const {
    const auto group = static_cast<size_t>(thread / kGroupThreads);
    return group < groups.size() && !groups[group].products.idle();
  }
};

}  // namespace quire::emulator
