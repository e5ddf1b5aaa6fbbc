// SPDX-License-Identifier: Apache-2.0
#include "kv_store/index.h"

#include "quire/error.h"
#include "reserve_more.h"

namespace quire {

int32_t StoreIndex::take() {
  if (!free_.empty()) {
    const int32_t slot = free_.back();
    free_.pop_back();
    return slot;
  }
  if (static_cast<int32_t>(keys_.size()) == capacity_) return kNone;
  reserve_more(keys_, 1);
  reserve_more(links_, 1);
  free_.reserve(keys_.capacity());  // erase() must not throw
  keys_.emplace_back();
  links_.emplace_back();
  return static_cast<int32_t>(keys_.size()) - 1;
}

void StoreIndex::fill(int32_t slot, const ChainKey& key) {
  slots_.emplace(key, slot);
  keys_[slot] = key;
  link_last(slot + 1);
}

void StoreIndex::erase(int32_t slot) {
  slots_.erase(keys_[slot]);
  unlink(slot + 1);
  free_.push_back(slot);
}

void StoreIndex::touch(int32_t slot) {
  unlink(slot + 1);
  link_last(slot + 1);
}

void StoreIndex::link_last(int32_t at) {
  const int32_t last = links_[0].prev;
  links_[at] = {last, 0};
  links_[last].next = links_[0].prev = at;
}

void StoreIndex::unlink(int32_t at) {
  links_[links_[at].prev].next = links_[at].next;
  links_[links_[at].next].prev = links_[at].prev;
}

int32_t store_capacity(const char* function, int64_t capacity_bytes, int64_t block_bytes) {
  QUIRE_CHECK_ARG(block_bytes >= 1, function, ": block_bytes: expected 1 or more, got ",
                  block_bytes);
  const int64_t capacity = capacity_bytes / block_bytes;
  QUIRE_CHECK_ARG(capacity >= 1 && capacity < INT32_MAX, function,
                  ": capacity_bytes: expected room for 1 to 2^31 - 2 blocks of ", block_bytes,
                  " bytes, got ", capacity_bytes);
  return static_cast<int32_t>(capacity);
}

}  // namespace quire
