// SPDX-License-Identifier: Apache-2.0
// IndexedStore: what stores have in common that keep an index in memory and work in a StoreWorker.
#pragma once

#include <mutex>

#include "kv_store/index.h"
#include "kv_store/worker.h"
#include "quire/kv_store.h"

namespace quire {

class IndexedStore : public KVStore {
 public:
  std::shared_ptr<KVTicket> put(const ChainKey& key, std::span<const std::byte> payload,
                                OnDone on_done) final;
  std::shared_ptr<KVTicket> get(const ChainKey& key, std::span<std::byte> out,
                                OnDone on_done) final;
  bool contains(const ChainKey& key) const noexcept final;
  bool erase(const ChainKey& key) final;
  void drain() final { worker().drain(); }
  size_t block_bytes() const final { return block_bytes_; }
  KVStoreStats stats() const final;

 protected:
  IndexedStore(const char* name, int64_t capacity_bytes, int64_t block_bytes)
      : block_bytes_(static_cast<size_t>(block_bytes)),
        index_(store_capacity(name, capacity_bytes, block_bytes)) {}

  // The last member of the class below, as its threads use all others.
  virtual StoreWorker& worker() = 0;
  virtual const StoreWorker& worker() const = 0;

  // Both want mutex_ held, once the worker runs.
  virtual void erase_slot(int32_t slot) = 0;
  int32_t take_slot();  // an unused slot, or that of the least recently used block

  const size_t block_bytes_;
  mutable std::mutex mutex_;  // of the two below
  StoreIndex index_;
  KVStoreStats stats_{};
};

}  // namespace quire
