// SPDX-License-Identifier: Apache-2.0
// Blocks in one slab of host memory. Only the worker writes to slots and reuses them, so it copies
// without holding the lock.
#include <algorithm>
#include <new>

#include "kv_store/indexed_store.h"

namespace quire {
namespace {

class HostStore final : public IndexedStore {
 public:
  explicit HostStore(const HostStoreConfig& config)
      : IndexedStore("HostStore", config.capacity_bytes, config.block_bytes),
        slab_(new std::byte[index_.capacity() * block_bytes_]),  // touched only where used
        worker_(config.max_pending,
                {.get = [this](const StoreRequest& request) { return run_get(request); },
                 .put =
                     [this](std::span<const StoreRequest> requests, std::span<KVOutcome> outcomes) {
                       outcomes[0] = run_put(requests[0]);
                     }}) {}

 private:
  StoreWorker& worker() override { return worker_; }
  const StoreWorker& worker() const override { return worker_; }
  void erase_slot(int32_t slot) override { index_.erase(slot); }

  std::byte* slot_data(int32_t slot) { return slab_.get() + slot * block_bytes_; }

  // A slot to fill, or kNone: the key is there already.
  int32_t slot_for(const ChainKey& key) {
    const std::lock_guard lock(mutex_);
    const int32_t known = index_.find(key);
    if (known != StoreIndex::kNone) {
      index_.touch(known);
      return StoreIndex::kNone;
    }
    return take_slot();
  }

  KVOutcome run_put(const StoreRequest& request) {
    const int32_t slot = slot_for(request.key);
    if (slot == StoreIndex::kNone) return KVOutcome::kDone;
    std::copy(request.payload.begin(), request.payload.end(), slot_data(slot));
    const std::lock_guard lock(mutex_);
    try {
      index_.fill(slot, request.key);
    } catch (const std::bad_alloc&) {
      index_.give_back(slot);
      throw;
    }
    ++stats_.stored;
    return KVOutcome::kDone;
  }

  KVOutcome run_get(const StoreRequest& request) {
    int32_t slot;
    {
      const std::lock_guard lock(mutex_);
      slot = index_.find(request.key);
      ++(slot == StoreIndex::kNone ? stats_.misses : stats_.hits);
      if (slot == StoreIndex::kNone) return KVOutcome::kMissing;
      index_.touch(slot);
    }
    std::copy_n(slot_data(slot), block_bytes_, request.out.begin());
    return KVOutcome::kDone;
  }

  const std::unique_ptr<std::byte[]> slab_;  // [capacity, block_bytes]
  StoreWorker worker_;                       // last: its thread uses all of the above
};

}  // namespace

std::unique_ptr<KVStore> make_host_store(const HostStoreConfig& config) {
  return std::make_unique<HostStore>(config);
}

}  // namespace quire
