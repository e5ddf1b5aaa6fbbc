// SPDX-License-Identifier: Apache-2.0
// KVStore: a slower place for the contents of KV blocks, found again by chain key.
//
//   std::unique_ptr<KVStore> store = make_host_store({.capacity_bytes = 8 << 30, .block_bytes =
//   n}); std::shared_ptr<KVTicket> ticket = store->put(key, payload);   // null: queue full, not
//   taken
//   ...                                            // `payload` stays as it is until then
//   if (ticket && ticket->wait() == KVOutcome::kDone) ...
//
// A payload is what one block holds in all layers: block_bytes bytes, the same for every block of
// a store. A store is a cache: it may give up blocks when it likes, but what get() delivers is
// what put() was given, bit by bit, or kMissing. All functions are thread-safe.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "quire/cache_tier.h"
#include "quire/chain_key.h"

namespace quire {

enum class KVOutcome : uint8_t {
  kPending,
  kDone,     // stored, or the payload is in `out`
  kMissing,  // get: not in the store; `out` may hold anything
  kFailed,   // put: an error of the medium, for example a full disk; not stored
};

// One request that was taken. The buffers of the request must live until it is no longer pending.
class KVTicket {
 public:
  KVOutcome outcome() const { return outcome_.load(std::memory_order_acquire); }
  KVOutcome wait() const {
    outcome_.wait(KVOutcome::kPending, std::memory_order_acquire);
    return outcome();
  }
  // For implementations of a store; once.
  void complete(KVOutcome outcome) {
    outcome_.store(outcome, std::memory_order_release);
    outcome_.notify_all();
  }

 private:
  std::atomic<KVOutcome> outcome_{KVOutcome::kPending};
};

struct KVStoreStats {
  int64_t num_blocks, capacity_blocks;
  int64_t num_pending;      // requests taken and not completed
  int64_t stored;           // puts that wrote a block
  int64_t hits, misses;     // of gets
  int64_t evicted;          // blocks given up for room
  int64_t not_taken;        // requests refused because the queue was full
  int64_t failed;           // puts that ended in kFailed
  int64_t dropped;          // blocks found torn or rotten; they were never delivered
  int64_t callback_errors;  // callbacks that threw
};

class KVStore {
 public:
  // Called on a thread of the store, before the ticket completes. It must neither wait for a
  // request nor take long. What it throws is counted, and changes nothing.
  using OnDone = std::function<void(KVOutcome)>;

  virtual ~KVStore() = default;  // completes what was taken

  // Null: the queue of puts is full and nothing has changed. A key that is there already keeps
  // its block. Throws InvalidArgument unless payload.size() == block_bytes().
  virtual std::shared_ptr<KVTicket> put(const ChainKey& key, std::span<const std::byte> payload,
                                        OnDone on_done = {}) = 0;

  // Null: the queue of gets is full. Gets do not wait for puts that wait.
  virtual std::shared_ptr<KVTicket> get(const ChainKey& key, std::span<std::byte> out,
                                        OnDone on_done = {}) = 0;

  // Whether a put of this key has completed, and the block is still there. A manager asks in the
  // midst of an eviction, where an exception would lose blocks: one ends the process instead.
  virtual bool contains(const ChainKey& key) const noexcept = 0;

  // True: the block was there. A put that waits is not undone.
  virtual bool erase(const ChainKey& key) = 0;

  // Waits until every request taken so far has completed.
  virtual void drain() = 0;

  virtual size_t block_bytes() const = 0;
  virtual CacheTier tier() const { return CacheTier::kHost; }
  virtual KVStoreStats stats() const = 0;
};

struct HostStoreConfig {
  int64_t capacity_bytes;  // of payloads; the least recently used are given up beyond it
  int64_t block_bytes;
  int32_t max_pending = 64;  // gets, and as many puts, that may wait
};

// Blocks in host memory. Throws InvalidArgument unless at least one block fits.
std::unique_ptr<KVStore> make_host_store(const HostStoreConfig& config);

struct FileStoreConfig {
  std::string path;  // a directory of this store alone; made if need be
  int64_t capacity_bytes;
  int64_t block_bytes;
  std::string identity;  // what the bytes mean: model, dtype, layout
  int32_t max_pending = 64;
};

// One file a block, checked by CRC32C when read; what is torn or rotten is deleted and counted. A
// file gets its name only when all of it is on the disk, so that a process killed at any moment
// loses at most what it had not completed; nor does a failing power, where the disk keeps what it
// has synced. Reopening lists the directory and reads no block; blocks keep their age, not their
// last use. Throws InvalidArgument for a directory of another block_bytes or identity, or one that
// another store has open, and std::system_error where the directory can't be used.
std::unique_ptr<KVStore> open_file_store(const FileStoreConfig& config);

}  // namespace quire
