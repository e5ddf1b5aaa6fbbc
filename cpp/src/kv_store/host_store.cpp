// SPDX-License-Identifier: Apache-2.0
// Blocks in one slab of host memory. Only the worker writes to slots and reuses them, so it copies
// without holding the lock.
#include <algorithm>

#include "kv_store/index.h"
#include "kv_store/worker.h"
#include "quire/error.h"

namespace quire {
namespace {

class HostStore final : public KVStore {
 public:
  explicit HostStore(const HostStoreConfig& config)
      : block_bytes_(static_cast<size_t>(config.block_bytes)),
        index_(store_capacity("HostStore", config.capacity_bytes, config.block_bytes)),
        slab_(new std::byte[index_.capacity() * block_bytes_]),  // touched only where used
        worker_(config.max_pending,
                {.get = [this](const StoreRequest& request) { return run_get(request); },
                 .put =
                     [this](std::span<const StoreRequest> requests, std::span<KVOutcome> outcomes) {
                       outcomes[0] = run_put(requests[0]);
                     }}) {}

  std::shared_ptr<KVTicket> put(const ChainKey& key, std::span<const std::byte> payload,
                                OnDone on_done) override {
    QUIRE_CHECK_ARG(payload.size() == block_bytes_, "put: payload: expected ", block_bytes_,
                    " bytes, got ", payload.size());
    return worker_.put({key, payload, {}, std::move(on_done)});
  }

  std::shared_ptr<KVTicket> get(const ChainKey& key, std::span<std::byte> out,
                                OnDone on_done) override {
    QUIRE_CHECK_ARG(out.size() == block_bytes_, "get: out: expected ", block_bytes_, " bytes, got ",
                    out.size());
    return worker_.get({key, {}, out, std::move(on_done)});
  }

  bool contains(const ChainKey& key) const override {
    const std::lock_guard lock(mutex_);
    return index_.find(key) != StoreIndex::kNone;
  }

  bool erase(const ChainKey& key) override {
    const std::lock_guard lock(mutex_);
    const int32_t slot = index_.find(key);
    if (slot == StoreIndex::kNone) return false;
    index_.erase(slot);
    return true;
  }

  void drain() override { worker_.drain(); }
  size_t block_bytes() const override { return block_bytes_; }

  KVStoreStats stats() const override {
    KVStoreStats stats{};
    {
      const std::lock_guard lock(mutex_);
      stats = stats_;
      stats.num_blocks = index_.size();
    }
    stats.capacity_blocks = index_.capacity();
    worker_.add_stats(stats);
    return stats;
  }

 private:
  std::byte* slot_data(int32_t slot) { return slab_.get() + slot * block_bytes_; }

  // A slot to fill, or kNone: the key is there already.
  int32_t take_slot(const ChainKey& key) {
    const std::lock_guard lock(mutex_);
    const int32_t known = index_.find(key);
    if (known != StoreIndex::kNone) {
      index_.touch(known);
      return StoreIndex::kNone;
    }
    int32_t slot = index_.take();
    if (slot != StoreIndex::kNone) return slot;
    index_.erase(index_.victim());
    ++stats_.evicted;
    return index_.take();
  }

  KVOutcome run_put(const StoreRequest& request) {
    const int32_t slot = take_slot(request.key);
    if (slot == StoreIndex::kNone) return KVOutcome::kDone;
    std::copy(request.payload.begin(), request.payload.end(), slot_data(slot));
    const std::lock_guard lock(mutex_);
    index_.fill(slot, request.key);
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

  const size_t block_bytes_;
  mutable std::mutex mutex_;  // of index_ and stats_
  StoreIndex index_;
  KVStoreStats stats_{};
  const std::unique_ptr<std::byte[]> slab_;  // [capacity, block_bytes]
  StoreWorker worker_;                       // last: its thread uses all of the above
};

}  // namespace

std::unique_ptr<KVStore> make_host_store(const HostStoreConfig& config) {
  return std::make_unique<HostStore>(config);
}

}  // namespace quire
