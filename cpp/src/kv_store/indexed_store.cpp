// SPDX-License-Identifier: Apache-2.0
#include "kv_store/indexed_store.h"

#include <utility>

#include "quire/error.h"

namespace quire {

std::shared_ptr<KVTicket> IndexedStore::put(const ChainKey& key, std::span<const std::byte> payload,
                                            OnDone on_done) {
  QUIRE_CHECK_ARG(payload.size() == block_bytes_, "put: payload: expected ", block_bytes_,
                  " bytes, got ", payload.size());
  return worker().put({key, payload, {}, std::move(on_done)});
}

std::shared_ptr<KVTicket> IndexedStore::get(const ChainKey& key, std::span<std::byte> out,
                                            OnDone on_done) {
  QUIRE_CHECK_ARG(out.size() == block_bytes_, "get: out: expected ", block_bytes_, " bytes, got ",
                  out.size());
  return worker().get({key, {}, out, std::move(on_done)});
}

bool IndexedStore::contains(const ChainKey& key) const noexcept {
  const std::lock_guard lock(mutex_);
  return index_.find(key) != StoreIndex::kNone;
}

bool IndexedStore::erase(const ChainKey& key) {
  const std::lock_guard lock(mutex_);
  const int32_t slot = index_.find(key);
  if (slot == StoreIndex::kNone) return false;
  erase_slot(slot);
  return true;
}

int32_t IndexedStore::take_slot() {
  const int32_t slot = index_.take();
  if (slot != StoreIndex::kNone) return slot;
  erase_slot(index_.victim());
  ++stats_.evicted;
  return index_.take();
}

KVStoreStats IndexedStore::stats() const {
  KVStoreStats stats{};
  {
    const std::lock_guard lock(mutex_);
    stats = stats_;
    stats.num_blocks = index_.size();
  }
  stats.capacity_blocks = index_.capacity();
  worker().add_stats(stats);
  return stats;
}

}  // namespace quire
