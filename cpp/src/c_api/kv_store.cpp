// SPDX-License-Identifier: Apache-2.0
// The C interface of stores and of chain keys.
#include "quire/kv_store.h"

#include <memory>
#include <vector>

#include "c_api/kv_tiers.h"

struct QuireKVTicket {
  std::shared_ptr<quire::KVTicket> ticket;
};

using namespace quire::c;

static_assert(QUIRE_KV_PENDING == static_cast<int>(quire::KVOutcome::kPending) &&
              QUIRE_KV_DONE == static_cast<int>(quire::KVOutcome::kDone) &&
              QUIRE_KV_MISSING == static_cast<int>(quire::KVOutcome::kMissing) &&
              QUIRE_KV_FAILED == static_cast<int>(quire::KVOutcome::kFailed));

QuireStatus quire_root_key(const char* salt, size_t salt_size, QuireChainKey* key) {
  return guard([&] {
    QuireChainKey& out = deref("quire_root_key: key", key);
    std::optional<std::string_view> given;
    if (salt) given.emplace(salt, salt_size);
    out = to_c(quire::root_key(given));
  });
}

QuireStatus quire_chain_keys(const QuireChainKey* parent, const int32_t* token_ids,
                             size_t num_tokens, int32_t block_size, QuireChainKey* buffer,
                             size_t* size) {
  return guard([&] {
    const quire::ChainKey first = as_key("quire_chain_keys: parent", parent);
    const auto tokens = as_span("quire_chain_keys: token_ids", token_ids, num_tokens);
    QUIRE_CHECK_ARG(block_size >= 1, "quire_chain_keys: block_size: expected at least 1, got ",
                    block_size);
    std::vector<quire::ChainKey> keys(num_tokens / block_size);
    quire::chain_keys(first, tokens, block_size, keys);
    std::vector<QuireChainKey> result;
    for (const quire::ChainKey& key : keys) result.push_back(to_c(key));
    write_array<QuireChainKey>("quire_chain_keys: size", result, buffer, size);
  });
}

QuireStatus quire_kv_store_new(const QuireKVStoreConfig* config, QuireKVStore** store) {
  return guard([&] {
    QuireKVStore*& out = deref("quire_kv_store_new: store", store);
    const auto given = read_struct<QuireKVStoreConfig>("quire_kv_store_new: config", config,
                                                       QUIRE_KV_STORE_CONFIG_INIT);
    if (given.path) {
      const quire::FileStoreConfig file{given.path, given.capacity_bytes, given.block_bytes,
                                        given.identity ? given.identity : "", given.max_pending};
      out = new QuireKVStore{quire::open_file_store(file)};
    } else {
      out = new QuireKVStore{
          quire::make_host_store({given.capacity_bytes, given.block_bytes, given.max_pending})};
    }
  });
}

void quire_kv_store_delete(QuireKVStore* store) { delete store; }

QuireStatus quire_kv_store_put(QuireKVStore* store, const QuireChainKey* key, const void* payload,
                               size_t payload_size, QuireKVTicket** ticket) {
  return guard([&] {
    auto& self = *deref("quire_kv_store_put: store", store).store;
    const quire::ChainKey name = as_key("quire_kv_store_put: key", key);
    QuireKVTicket*& out = deref("quire_kv_store_put: ticket", ticket);
    const auto bytes = as_span("quire_kv_store_put: payload",
                               static_cast<const std::byte*>(payload), payload_size);
    auto taken = std::make_unique<QuireKVTicket>();  // before the request, which can't be undone
    taken->ticket = self.put(name, bytes);
    out = taken->ticket ? taken.release() : nullptr;
  });
}

QuireStatus quire_kv_store_get(QuireKVStore* store, const QuireChainKey* key, void* payload,
                               size_t payload_size, QuireKVTicket** ticket) {
  return guard([&] {
    auto& self = *deref("quire_kv_store_get: store", store).store;
    const quire::ChainKey name = as_key("quire_kv_store_get: key", key);
    QuireKVTicket*& out = deref("quire_kv_store_get: ticket", ticket);
    const auto bytes =
        as_span("quire_kv_store_get: payload", static_cast<std::byte*>(payload), payload_size);
    auto taken = std::make_unique<QuireKVTicket>();
    taken->ticket = self.get(name, bytes);
    out = taken->ticket ? taken.release() : nullptr;
  });
}

QuireStatus quire_kv_store_contains(const QuireKVStore* store, const QuireChainKey* key,
                                    int32_t* contains) {
  return guard([&] {
    const auto& self = *deref("quire_kv_store_contains: store", store).store;
    int32_t& out = deref("quire_kv_store_contains: contains", contains);
    out = self.contains(as_key("quire_kv_store_contains: key", key));
  });
}

QuireStatus quire_kv_store_erase(QuireKVStore* store, const QuireChainKey* key, int32_t* erased) {
  return guard([&] {
    auto& self = *deref("quire_kv_store_erase: store", store).store;
    int32_t& out = deref("quire_kv_store_erase: erased", erased);
    out = self.erase(as_key("quire_kv_store_erase: key", key));
  });
}

QuireStatus quire_kv_store_drain(QuireKVStore* store) {
  return guard([&] { deref("quire_kv_store_drain: store", store).store->drain(); });
}

QuireStatus quire_kv_store_stats(const QuireKVStore* store, QuireKVStoreStats* stats) {
  return guard([&] {
    const auto& self = *deref("quire_kv_store_stats: store", store).store;
    check_struct_size("quire_kv_store_stats: stats", stats);
    const quire::KVStoreStats s = self.stats();
    write_struct<QuireKVStoreStats>(
        {sizeof(QuireKVStoreStats), s.num_blocks, s.capacity_blocks, s.num_pending, s.stored,
         s.hits, s.misses, s.evicted, s.not_taken, s.failed, s.dropped},
        stats);
  });
}

QuireStatus quire_kv_ticket_outcome(const QuireKVTicket* ticket, int32_t* outcome) {
  return guard([&] {
    const auto& self = *deref("quire_kv_ticket_outcome: ticket", ticket).ticket;
    deref("quire_kv_ticket_outcome: outcome", outcome) = static_cast<int32_t>(self.outcome());
  });
}

QuireStatus quire_kv_ticket_wait(const QuireKVTicket* ticket, int32_t* outcome) {
  return guard([&] {
    const auto& self = *deref("quire_kv_ticket_wait: ticket", ticket).ticket;
    deref("quire_kv_ticket_wait: outcome", outcome) = static_cast<int32_t>(self.wait());
  });
}

void quire_kv_ticket_delete(QuireKVTicket* ticket) { delete ticket; }
