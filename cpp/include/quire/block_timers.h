// SPDX-License-Identifier: Apache-2.0
// BlockTimers: which blocks have a time to live, and whose ends first.
//
// A block with a time to live has a deadline once it has been given up, and a timer until the
// deadline is taken note of. Timers lie in a heap over block ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace quire {

// 24 bytes a block. Nothing but the constructor asks for memory.
class BlockTimers {
 public:
  explicit BlockTimers(int32_t num_blocks)
      : ttls_(num_blocks, kNone), deadlines_(num_blocks), places_(num_blocks, -1) {
    heap_.reserve(num_blocks);
  }

  bool empty() const { return num_blocks_ == 0; }
  bool contains(int32_t block) const { return ttls_[block] != kNone; }
  double ttl(int32_t block) const { return ttls_[block]; }             // seconds
  int64_t deadline(int32_t block) const { return deadlines_[block]; }  // ns; 0: not given up yet

  // A time to live, 0 or more, that has not begun.
  void set_ttl(int32_t block, double seconds);
  // It ends at this time: a timer for a block with a time to live, instead of the one it had.
  void start(int32_t block, int64_t deadline);
  void erase(int32_t block);  // no effect on a block without

  // The block with the earliest deadline (of equal ones the lowest block), -1 without timers.
  int32_t first() const { return heap_.empty() ? -1 : heap_[0]; }
  void stop(int32_t block);  // its timer; the time to live stays

  int64_t num_bytes() const {
    return static_cast<int64_t>(ttls_.size() * (sizeof ttls_[0] + sizeof deadlines_[0] +
                                                sizeof places_[0] + sizeof heap_[0]));
  }

  // Walks everything; throws InvariantError.
  void validate() const;

 private:
  static constexpr double kNone = -1;

  bool is_before(int32_t a, int32_t b) const {
    return deadlines_[a] != deadlines_[b] ? deadlines_[a] < deadlines_[b] : a < b;
  }
  void put(size_t place, int32_t block);
  void settle(size_t place);

  std::vector<double> ttls_;        // kNone: no time to live
  std::vector<int64_t> deadlines_;  // of those with one
  std::vector<int32_t> places_;     // in the heap; -1: no timer
  std::vector<int32_t> heap_;       // no block is before its parent, (place - 1) / 2
  int32_t num_blocks_ = 0;          // with a time to live
};

}  // namespace quire
