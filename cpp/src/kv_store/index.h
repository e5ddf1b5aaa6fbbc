// SPDX-License-Identifier: Apache-2.0
// StoreIndex: which key lies in which slot of a store, and which slot to give up next.
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "quire/chain_key.h"

namespace quire {

// Not thread-safe. Slots are 0 ... capacity - 1; memory grows with the slots in use. The least
// recently used slot is given up first.
class StoreIndex {
 public:
  static constexpr int32_t kNone = -1;

  explicit StoreIndex(int32_t capacity) : capacity_(capacity) {}

  int32_t find(const ChainKey& key) const {
    const auto it = slots_.find(key);
    return it == slots_.end() ? kNone : it->second;
  }
  void touch(int32_t slot);

  // A slot that holds nothing, or kNone: all are in use, and victim() has to be erased first.
  int32_t take();
  void give_back(int32_t slot) { free_.push_back(slot); }  // one that was taken and not filled
  void reserve(int32_t count) { slots_.reserve(count); }
  void fill(int32_t slot, const ChainKey& key);
  void erase(int32_t slot);
  int32_t victim() const { return links_[0].next - 1; }  // kNone: none is filled
  const ChainKey& key(int32_t slot) const { return keys_[slot]; }

  int32_t size() const { return static_cast<int32_t>(slots_.size()); }
  int32_t capacity() const { return capacity_; }

 private:
  struct Links {
    int32_t prev = 0, next = 0;
  };
  void link_last(int32_t at);
  void unlink(int32_t at);

  int32_t capacity_;
  std::unordered_map<ChainKey, int32_t, ChainKeyHash> slots_;
  std::vector<ChainKey> keys_;
  std::vector<int32_t> free_;    // slots below keys_.size() that hold nothing
  std::vector<Links> links_{1};  // a circle through entry 0; that of a slot is slot + 1
};

// How many blocks fit. Throws InvalidArgument for none, or more than an int32 counts.
int32_t store_capacity(const char* function, int64_t capacity_bytes, int64_t block_bytes);

}  // namespace quire
