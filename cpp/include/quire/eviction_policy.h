// SPDX-License-Identifier: Apache-2.0
// Which cached block nobody uses to give up next: the least recently used one (kLru), or kReuseLru:
// LRU by classes of reuse.
//
// Class k holds the blocks that were hit k times, the last class those hit more often. Of the
// oldest blocks of each class that one goes whose age, divided by the weight of its class, is the
// greatest; ages count blocks given back since. The class of an evicted block is remembered for a
// while: contents that come back start one class higher. No block is in a higher class than its
// parent, so that a victim has no cached child, as under LRU.
//
// Prompts are often used once, and those used twice often many times: on traces of conversations
// this hits about 1 % of all blocks more than LRU does (tests/bench/bench_eviction.py).
//
// BlockAllocator keeps the lists and the order within them; here is what classes need beside.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace quire {

enum class Eviction : uint8_t { kLru, kReuseLru };

// 16 bytes a block. Every operation is O(1), but for the hash over a block's tokens.
class ReuseClasses {
 public:
  static constexpr int32_t kNumClasses = 4;
  static constexpr std::array<uint64_t, kNumClasses> kWeights = {1, 2, 3, 4};
  static constexpr int32_t kNone = -1;

  explicit ReuseClasses(int32_t num_blocks);

  // Names contents for this purpose alone: two prefixes of one id would only share their history.
  static uint64_t content_id(uint64_t parent_id, std::span<const int32_t> tokens);

  // New contents in a block that is in use. `parent`: a block, or negative.
  void admit(int32_t block, uint64_t id, int32_t parent);
  void use(int32_t block, int32_t parent);  // a hit, of a block that is in use
  void release(int32_t block) { stamps_[block].time = ++now_ & kTimeMask; }  // nobody uses it now
  void evict(int32_t block);  // its contents are given up for room

  // The block to give up, of the oldest one of each class (kNone: the class has none).
  int32_t choose(const std::array<int32_t, kNumClasses>& oldest) const;

  int32_t reuse_class(int32_t block) const { return static_cast<int32_t>(stamps_[block].reuse); }
  uint64_t id(int32_t block) const { return ids_[block]; }
  // Everything, as integers, and back: for snapshots. load() throws InvalidArgument.
  std::vector<int64_t> save() const;
  void load(std::span<const int64_t> numbers);

  int64_t num_bytes() const {
    return static_cast<int64_t>(stamps_.size() * sizeof(Stamp) + ids_.size() * sizeof ids_[0] +
                                memory_.size() * sizeof memory_[0]);
  }

 private:
  static constexpr uint32_t kTimeMask = (1u << 30) - 1;

  struct Stamp {
    uint32_t reuse : 2;
    uint32_t time : 30;  // of the last release, modulo 2^30
  };
  uint32_t age(int32_t block) const { return (now_ - stamps_[block].time) & kTimeMask; }
  uint32_t class_under(int32_t parent, uint32_t reuse) const {
    return parent < 0 ? reuse : std::min<uint32_t>(reuse, stamps_[parent].reuse);
  }
  uint16_t& memory_of(uint64_t id) { return memory_[(id >> 16) % memory_.size()]; }

  std::vector<Stamp> stamps_;
  std::vector<uint64_t> ids_;
  // Two entries a block: 13 bits of an evicted block's id and its class; 0: none. A new entry
  // takes the place of an older one. A false match, 1 in 8,192, puts a block into too high a class.
  std::vector<uint16_t> memory_;
  uint32_t now_ = 0;  // releases so far
};

}  // namespace quire
