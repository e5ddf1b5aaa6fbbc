// SPDX-License-Identifier: Apache-2.0
// EventLog: what happened to cached blocks, for routers and tiers that follow along.
//
// A ring of the latest events. Who takes them too late finds a gap in the sequence numbers and
// the number of lost ones, and has to ask for the whole state anew.
#pragma once

#include <cstdint>
#include <vector>

#include "quire/cache_tier.h"
#include "quire/chain_key.h"

namespace quire {

enum class CacheEventKind : uint8_t {
  kStored,   // the block's contents can be found in the cache from now on
  kRemoved,  // they were given up on purpose, by clear_cache()
  kEvicted,  // they were given up for room
  kSwapped,  // they left for room, and the store `tier` has been offered them or has them already
};

struct CacheEvent {
  int64_t sequence = 0;  // 1, 2, 3, ... without a gap, over all events
  CacheEventKind kind = CacheEventKind::kStored;
  CacheTier tier = CacheTier::kDevice;  // where it happened; kSwapped: where the contents are now
  int32_t block = -1;                   // id in the pool, or -1
  ChainKey key;
  ChainKey parent;  // of the block before, or the root key of the salt
};

// 80 bytes an event, all of it allocated at once. Not thread-safe, like the manager that writes.
class EventLog {
 public:
  explicit EventLog(int32_t capacity);

  // Gives the event its number. The oldest event that nobody took is lost when the log is full.
  void push(CacheEvent event);

  // Appends the events since the last call, the oldest first, and returns how many were lost
  // before them.
  int64_t take(std::vector<CacheEvent>& events);

  int32_t capacity() const { return static_cast<int32_t>(ring_.size()); }
  int32_t size() const { return static_cast<int32_t>(last_ - taken_ - lost_); }
  int64_t last_sequence() const { return last_; }
  int64_t num_lost() const { return num_lost_; }  // since the start

 private:
  std::vector<CacheEvent> ring_;  // event of number n in entry n % capacity
  int64_t last_ = 0;
  int64_t taken_ = 0;  // number of the latest event that was taken or lost before a take()
  int64_t lost_ = 0;   // since then
  int64_t num_lost_ = 0;
};

}  // namespace quire
