// SPDX-License-Identifier: Apache-2.0
// The C interface of KVCacheManager for what leaves the pool and comes back: stores, host blocks,
// events and snapshots.
#include "c_api/kv_tiers.h"

#include "c_api/handles.h"

namespace quire::c {
namespace {

static_assert(QUIRE_TIER_DEVICE == static_cast<int>(CacheTier::kDevice) &&
              QUIRE_TIER_HOST == static_cast<int>(CacheTier::kHost) &&
              QUIRE_TIER_FILE == static_cast<int>(CacheTier::kFile));
static_assert(QUIRE_EVENT_STORED == static_cast<int>(CacheEventKind::kStored) &&
              QUIRE_EVENT_REMOVED == static_cast<int>(CacheEventKind::kRemoved) &&
              QUIRE_EVENT_EVICTED == static_cast<int>(CacheEventKind::kEvicted) &&
              QUIRE_EVENT_SWAPPED == static_cast<int>(CacheEventKind::kSwapped));

QuireKVTransfer as_c(const KVTransfer& transfer) {
  return {transfer.block, static_cast<int32_t>(transfer.tier), to_c(transfer.key)};
}

QuireCacheEvent as_c(const CacheEvent& event) {
  return {event.sequence,
          static_cast<int32_t>(event.kind),
          static_cast<int32_t>(event.tier),
          event.block,
          0,
          to_c(event.key),
          to_c(event.parent)};
}

QuireBlockPair as_c(const std::array<int32_t, 2>& pair) { return {pair[0], pair[1]}; }

// For calls that can't be undone: room for as many elements as the sequence has blocks, first.
template <class T, class Call>
QuireStatus write_blocks(const char* argument, const KVCacheManager& manager, SequenceId seq,
                         T* buffer, size_t* size, Call call) {
  size_t& capacity = deref(argument, size);
  const auto lock = manager.lock();
  const int64_t num_tokens = manager.num_tokens(seq);
  const auto most = static_cast<size_t>(manager.num_blocks_for(num_tokens, num_tokens));
  if (!buffer) {
    capacity = most;
    return QUIRE_OK;
  }
  QUIRE_CHECK_ARG(capacity >= most, argument, ": expected room for ", most, " elements, got ",
                  capacity);
  const auto values = call();
  if (!values) return QUIRE_OUT_OF_BLOCKS;
  capacity = values->size();
  std::transform(values->begin(), values->end(), buffer, [](auto& value) { return as_c(value); });
  return QUIRE_OK;
}

}  // namespace
}  // namespace quire::c

using namespace quire::c;

QuireStatus quire_kv_cache_manager_attach_store(QuireKVCacheManager* manager,
                                                const QuireKVStore* store) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_attach_store: manager", manager).manager;
    self.attach_store(*deref("quire_kv_cache_manager_attach_store: store", store).store);
  });
}

QuireStatus quire_kv_cache_manager_take_offloads(QuireKVCacheManager* manager,
                                                 const QuireKVTransfer** transfers,
                                                 size_t* num_transfers) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_take_offloads: manager", manager);
    auto& out = deref("quire_kv_cache_manager_take_offloads: transfers", transfers);
    size_t& count = deref("quire_kv_cache_manager_take_offloads: num_transfers", num_transfers);
    const auto lock = self.manager.lock();
    self.offloads.clear();
    self.offloads.reserve(self.manager.num_offloads());  // each comes once
    for (const quire::KVTransfer& transfer : self.manager.take_offloads())
      self.offloads.push_back(as_c(transfer));
    out = self.offloads.data();
    count = self.offloads.size();
  });
}

QuireStatus quire_kv_cache_manager_fetch(QuireKVCacheManager* manager, QuireSequenceId seq,
                                         QuireKVTransfer* buffer, size_t* size) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_fetch: manager", manager).manager;
    return write_blocks("quire_kv_cache_manager_fetch: size", self, as_id(seq), buffer, size,
                        [&] { return self.fetch(as_id(seq)); });
  });
}

QuireStatus quire_kv_cache_manager_fetched(QuireKVCacheManager* manager, QuireSequenceId seq,
                                           int32_t num_blocks) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_fetched: manager", manager).manager;
    self.fetched(as_id(seq), num_blocks);
  });
}

QuireStatus quire_kv_cache_manager_swap_out(QuireKVCacheManager* manager, QuireSequenceId seq,
                                            QuireBlockPair* buffer, size_t* size) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_swap_out: manager", manager).manager;
    return write_blocks("quire_kv_cache_manager_swap_out: size", self, as_id(seq), buffer, size,
                        [&] { return self.swap_out(as_id(seq)); });
  });
}

QuireStatus quire_kv_cache_manager_swap_in(QuireKVCacheManager* manager, QuireSequenceId seq,
                                           QuireBlockPair* buffer, size_t* size) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_swap_in: manager", manager).manager;
    return write_blocks("quire_kv_cache_manager_swap_in: size", self, as_id(seq), buffer, size,
                        [&] { return self.swap_in(as_id(seq)); });
  });
}

QuireStatus quire_kv_cache_manager_is_swapped_out(const QuireKVCacheManager* manager,
                                                  QuireSequenceId seq, int32_t* is_swapped_out) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_is_swapped_out: manager", manager).manager;
    int32_t& out = deref("quire_kv_cache_manager_is_swapped_out: is_swapped_out", is_swapped_out);
    out = self.is_swapped_out(as_id(seq));
  });
}

QuireStatus quire_kv_cache_manager_clear_cache(QuireKVCacheManager* manager, int32_t* num_blocks) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_clear_cache: manager", manager).manager;
    int32_t& out = deref("quire_kv_cache_manager_clear_cache: num_blocks", num_blocks);
    out = self.clear_cache();
  });
}

QuireStatus quire_kv_cache_manager_take_events(QuireKVCacheManager* manager,
                                               QuireCacheEvent* buffer, size_t* size) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_take_events: manager", manager);
    size_t& capacity = deref("quire_kv_cache_manager_take_events: size", size);
    const auto lock = self.manager.lock();
    // Only when none are left, so that no more wait here than event_capacity.
    if (self.events.empty()) self.events = self.manager.take_events();
    const size_t count = self.events.size();
    if (!buffer) {
      capacity = count;
      return;
    }
    capacity = std::min(capacity, count);
    const auto end = self.events.begin() + static_cast<std::ptrdiff_t>(capacity);
    std::transform(self.events.begin(), end, buffer, [](auto& event) { return as_c(event); });
    self.events.erase(self.events.begin(), end);
  });
}

QuireStatus quire_kv_cache_manager_cached_blocks(const QuireKVCacheManager* manager,
                                                 int32_t* buffer, size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_cached_blocks: manager", manager).manager;
    const std::vector<int32_t> blocks = self.cached_blocks();
    write_array<int32_t>("quire_kv_cache_manager_cached_blocks: size", blocks, buffer, size);
  });
}

QuireStatus quire_kv_cache_manager_snapshot(const QuireKVCacheManager* manager, char* buffer,
                                            size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_snapshot: manager", manager).manager;
    const std::string text = self.snapshot();
    write_array<char>("quire_kv_cache_manager_snapshot: size", text, buffer, size);
  });
}

QuireStatus quire_kv_cache_manager_restore(const char* snapshot, size_t size,
                                           QuireKVCacheManager** manager) {
  return guard([&] {
    QuireKVCacheManager*& out = deref("quire_kv_cache_manager_restore: manager", manager);
    const auto given = as_span("quire_kv_cache_manager_restore: snapshot", snapshot, size);
    out = new QuireKVCacheManager{quire::KVCacheManager::restore({given.data(), given.size()})};
  });
}
