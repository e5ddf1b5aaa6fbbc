// SPDX-License-Identifier: Apache-2.0
// EvictionPolicy: which cached block nobody uses to give up next.
//
//   policy.admit(block, id, parent);   // new contents, from the root down; the block is in use
//   policy.release(block);             // nobody uses it: it may be given up; leaves come first
//   policy.use(block);                 // a hit, from the root down: it may not be given up
//   policy.evict(policy.victim(), id); // its contents are given up for room; `id` names them
//   policy.remove(block);              // its contents are given up for another reason
//
// A block is used only together with its ancestors, and released before them. Then a victim has
// no cached child, under either policy. Every operation is O(1).
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace quire {

template <class P>
concept EvictionPolicy =
    requires(P policy, const P& constant, int32_t block, uint64_t id, int32_t parent) {
      P(int32_t{});                     // of blocks
      policy.admit(block, id, parent);  // parent: a cached block, or P::kNone at a root
      policy.release(block);
      policy.use(block);
      policy.evict(block, id);
      policy.remove(block);
      { constant.victim() } -> std::same_as<int32_t>;  // P::kNone: no block may be given up
      { P::kBytesPerBlock } -> std::convertible_to<size_t>;
    };

// Circular lists through one pair of link arrays: a block is in at most one of them.
class BlockLists {
 public:
  BlockLists(int32_t num_blocks, int32_t num_lists);
  void push_back(int32_t list, int32_t block);
  void unlink(int32_t block);
  int32_t front(int32_t list) const;  // -1: empty

 private:
  struct Links {
    int32_t prev, next;
  };
  int32_t num_blocks_;
  std::vector<Links> links_;  // [num_blocks + num_lists]: the sentinels lie behind the blocks
};

// Least recently released first.
class LruPolicy {
 public:
  static constexpr int32_t kNone = -1;
  static constexpr size_t kBytesPerBlock = 8;

  explicit LruPolicy(int32_t num_blocks) : list_(num_blocks, 1) {}

  void admit(int32_t, uint64_t, int32_t) {}
  void release(int32_t block) { list_.push_back(0, block); }
  void use(int32_t block) { list_.unlink(block); }
  void evict(int32_t block, uint64_t) { list_.unlink(block); }
  void remove(int32_t block) { list_.unlink(block); }
  int32_t victim() const { return list_.front(0); }

 private:
  BlockLists list_;
};

// LRU by classes of reuse: class k holds the blocks that were hit k times, the last class those
// hit more often. Of the oldest blocks of each class that one goes whose age, divided by the
// weight of its class, is the greatest. The class of an evicted block is remembered for a while:
// contents that come back start one class higher. No block is in a higher class than its parent.
//
// Prompts are often used once, and those used twice often many times: on traces of conversations
// this hits 1 to 2 % of all blocks more than LRU does (tests/bench/bench_eviction.py).
class ReuseLruPolicy {
 public:
  static constexpr int32_t kNone = -1;
  static constexpr size_t kBytesPerBlock = 16;
  static constexpr int32_t kNumClasses = 4;
  static constexpr std::array<uint64_t, kNumClasses> kWeights = {1, 2, 3, 4};

  explicit ReuseLruPolicy(int32_t num_blocks);

  void admit(int32_t block, uint64_t id, int32_t parent);
  void release(int32_t block);
  void use(int32_t block);
  void evict(int32_t block, uint64_t id);
  void remove(int32_t block) { lists_.unlink(block); }
  int32_t victim() const;

  int32_t reuse_class(int32_t block) const { return stamps_[block].reuse; }

 private:
  struct Stamp {
    uint32_t reuse : 2;
    uint32_t time : 30;  // of the last release, modulo 2^30
  };
  uint32_t age(int32_t block) const { return (now_ - stamps_[block].time) & kTimeMask; }
  uint16_t& memory_of(uint64_t id) { return memory_[(id >> 16) % memory_.size()]; }

  static constexpr uint32_t kTimeMask = (1u << 30) - 1;

  BlockLists lists_;
  std::vector<Stamp> stamps_;
  // Two entries a block: 13 bits of an evicted block's id and its class; 0: none. A new entry
  // takes the place of an older one. A false match, 1 in 8,192, puts a block into too high a class.
  std::vector<uint16_t> memory_;
  uint32_t now_ = 0;  // releases so far
};

static_assert(EvictionPolicy<LruPolicy> && EvictionPolicy<ReuseLruPolicy>);

}  // namespace quire
