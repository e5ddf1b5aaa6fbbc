// SPDX-License-Identifier: Apache-2.0
// The C interface of stores, host blocks, events and snapshots, with a toy engine whose KV of a
// token is the token itself.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>

#include "c_kv_case.h"
#include "store_case.h"

using namespace c_kv_case;

namespace {

QuireKVStore* make_store(const char* path = nullptr) {
  QuireKVStoreConfig config = QUIRE_KV_STORE_CONFIG_INIT;
  config.capacity_bytes = 1600;
  config.block_bytes = 16;
  config.path = path;
  config.identity = "int32 tokens";
  QuireKVStore* store = nullptr;
  REQUIRE_MESSAGE(quire_kv_store_new(&config, &store) == QUIRE_OK, quire_last_error());
  return store;
}

int32_t finish(QuireKVTicket* ticket) {
  REQUIRE(ticket != nullptr);
  int32_t waited = -1, outcome = -1;
  REQUIRE(quire_kv_ticket_wait(ticket, &waited) == QUIRE_OK);
  REQUIRE(quire_kv_ticket_outcome(ticket, &outcome) == QUIRE_OK);
  CHECK(waited == outcome);
  quire_kv_ticket_delete(ticket);
  return outcome;
}

int32_t put(QuireKVStore* store, const QuireChainKey& key, const int32_t* tokens) {
  QuireKVTicket* ticket = nullptr;
  REQUIRE(quire_kv_store_put(store, &key, tokens, 16, &ticket) == QUIRE_OK);
  return finish(ticket);
}

int32_t get(QuireKVStore* store, const QuireChainKey& key, int32_t* tokens) {
  QuireKVTicket* ticket = nullptr;
  REQUIRE(quire_kv_store_get(store, &key, tokens, 16, &ticket) == QUIRE_OK);
  return finish(ticket);
}

QuireKVStoreStats store_stats(const QuireKVStore* store) {
  QuireKVStoreStats stats = QUIRE_KV_STORE_STATS_INIT;
  REQUIRE(quire_kv_store_stats(store, &stats) == QUIRE_OK);
  return stats;
}

std::vector<QuireChainKey> keys_of(const Ids& tokens) {
  QuireChainKey root;
  REQUIRE(quire_root_key(nullptr, 0, &root) == QUIRE_OK);
  return ask_twice<QuireChainKey>([&](QuireChainKey* buffer, size_t* size) {
    return quire_chain_keys(&root, tokens.data(), tokens.size(), 4, buffer, size);
  });
}

// Copies what the latest call evicted; the KV of a block is 4 tokens.
size_t offload(QuireKVCacheManager* manager, QuireKVStore* store, const Ids& kv) {
  const QuireKVTransfer* transfers = nullptr;
  size_t count = 0;
  REQUIRE(quire_kv_cache_manager_take_offloads(manager, &transfers, &count) == QUIRE_OK);
  for (size_t i = 0; i < count; ++i)
    CHECK(put(store, transfers[i].key, &kv[transfers[i].block * 4]) == QUIRE_KV_DONE);
  return count;
}

void compute(QuireKVCacheManager* manager, QuireSequenceId seq, QuireKVStore* store, Ids& kv) {
  const QuireStepBatch batch = step(manager, seq);
  if (store) offload(manager, store, kv);
  const auto tokens = ask_twice<int32_t>([&](int32_t* buffer, size_t* size) {
    return quire_kv_cache_manager_token_ids(manager, seq, buffer, size);
  });
  for (int64_t i = 0; i < batch.total_q; ++i)
    kv[batch.slot_mapping[i]] = tokens[batch.positions[i]];
  commit(manager, seq);
}

std::vector<QuireCacheEvent> events_of(QuireKVCacheManager* manager) {
  return ask_twice<QuireCacheEvent>([&](QuireCacheEvent* buffer, size_t* size) {
    return quire_kv_cache_manager_take_events(manager, buffer, size);
  });
}

}  // namespace

TEST_CASE("stores keep what they are given") {
  const store_case::TemporaryFolder folder;
  const Ids tokens = range(0, 11);
  const auto keys = keys_of(tokens);
  REQUIRE(keys.size() == 2);
  const quire::ChainKey expected = quire::chain_key(quire::root_key(), std::span(tokens).first(4));
  CHECK(std::memcmp(keys[0].bytes, expected.bytes.data(), 32) == 0);
  for (const char* path : {static_cast<const char*>(nullptr), folder.path().c_str()}) {
    QuireKVStore* store = make_store(path);
    int32_t flag = -1;
    CHECK(put(store, keys[0], tokens.data()) == QUIRE_KV_DONE);
    REQUIRE(quire_kv_store_drain(store) == QUIRE_OK);
    Ids out(4);
    CHECK(get(store, keys[0], out.data()) == QUIRE_KV_DONE);
    CHECK(out == range(0, 4));
    CHECK(get(store, keys[1], out.data()) == QUIRE_KV_MISSING);
    REQUIRE(quire_kv_store_contains(store, &keys[0], &flag) == QUIRE_OK);
    CHECK(flag == 1);
    const QuireKVStoreStats stats = store_stats(store);
    CHECK(stats.num_blocks == 1);
    CHECK(stats.capacity_blocks == 100);
    CHECK(stats.stored == 1);
    CHECK(stats.hits == 1);
    CHECK(stats.misses == 1);
    REQUIRE(quire_kv_store_erase(store, &keys[0], &flag) == QUIRE_OK);
    CHECK(flag == 1);
    REQUIRE(quire_kv_store_erase(store, &keys[0], &flag) == QUIRE_OK);
    CHECK(flag == 0);

    QuireKVTicket* ticket = nullptr;
    CHECK(error_of(quire_kv_store_put(store, &keys[0], out.data(), 15, &ticket)).find("15") !=
          std::string::npos);
    CHECK(error_of(quire_kv_store_get(store, &keys[0], nullptr, 16, &ticket)) ==
          "quire_kv_store_get: payload: expected 16 elements, got NULL");
    CHECK(error_of(quire_kv_store_put(store, nullptr, out.data(), 16, &ticket)) ==
          "quire_kv_store_put: key: expected a pointer, got NULL");
    CHECK(ticket == nullptr);
    quire_kv_store_delete(store);
  }
  QuireKVStoreConfig config = QUIRE_KV_STORE_CONFIG_INIT;
  QuireKVStore* store = nullptr;
  error_of(quire_kv_store_new(&config, &store));
  config.capacity_bytes = config.block_bytes = 16;
  config.path = "/dev/null/store";
  error_of(quire_kv_store_new(&config, &store), QUIRE_SYSTEM_ERROR);
  CHECK(store == nullptr);
  quire_kv_store_delete(nullptr);
  quire_kv_ticket_delete(nullptr);
}

TEST_CASE("what was evicted comes back from a store, and events tell of it") {
  QuireKVStore* store = make_store();
  QuireKVCacheConfig config = config_of(8);
  config.event_capacity = 100;
  QuireKVCacheManager* manager = make_manager(config);
  REQUIRE(quire_kv_cache_manager_attach_store(manager, store) == QUIRE_OK);
  error_of(quire_kv_cache_manager_attach_store(manager, store));
  Ids kv(32, -1);
  const Ids prompt = range(0, 26);
  QuireSequenceId seq = create(manager, prompt);
  compute(manager, seq, store, kv);
  free(manager, seq);
  // Events that don't fit stay.
  QuireCacheEvent first[2];
  size_t size = 2;
  REQUIRE(quire_kv_cache_manager_take_events(manager, first, &size) == QUIRE_OK);
  REQUIRE(size == 2);
  CHECK(first[0].sequence == 1);
  CHECK(first[0].kind == QUIRE_EVENT_STORED);
  CHECK(first[0].tier == QUIRE_TIER_DEVICE);
  CHECK(std::memcmp(first[1].parent.bytes, first[0].key.bytes, 32) == 0);
  auto events = events_of(manager);
  REQUIRE(!events.empty());
  CHECK(events[0].sequence == 3);
  CHECK(events_of(manager).empty());
  const auto cached = ask_twice<int32_t>([&](int32_t* buffer, size_t* count) {
    return quire_kv_cache_manager_cached_blocks(manager, buffer, count);
  });
  CHECK(cached.size() == 7);

  seq = create(manager, range(1000, 32));
  compute(manager, seq, store, kv);
  free(manager, seq);
  CHECK(store_stats(store).num_blocks == 6);
  events = events_of(manager);
  CHECK(std::count_if(events.begin(), events.end(),
                      [](auto& e) { return e.kind == QUIRE_EVENT_SWAPPED; }) == 6);

  seq = create(manager, prompt);
  QuireKVTransfer loads[8];
  size = 6;
  CHECK(error_of(quire_kv_cache_manager_fetch(manager, seq, loads, &size)) ==
        "quire_kv_cache_manager_fetch: size: expected room for 7 elements, got 6");
  REQUIRE(quire_kv_cache_manager_fetch(manager, seq, nullptr, &size) == QUIRE_OK);
  CHECK(size == 7);
  REQUIRE(quire_kv_cache_manager_fetch(manager, seq, loads, &size) == QUIRE_OK);
  REQUIRE(size == 6);
  offload(manager, store, kv);
  for (size_t i = 0; i < size; ++i) {
    CHECK(loads[i].tier == QUIRE_TIER_HOST);
    CHECK(get(store, loads[i].key, &kv[loads[i].block * 4]) == QUIRE_KV_DONE);
    CHECK(kv[loads[i].block * 4 + 3] == static_cast<int32_t>(i) * 4 + 3);
  }
  error_of(quire_kv_cache_manager_fetched(manager, seq, 7));
  REQUIRE(quire_kv_cache_manager_fetched(manager, seq, 6) == QUIRE_OK);
  CHECK(info_of(manager, seq).num_computed_tokens == 24);
  CHECK(stats_of(manager).host_hit_tokens == 24);
  REQUIRE(quire_kv_cache_manager_validate(manager) == QUIRE_OK);
  quire_kv_cache_manager_delete(manager);
  quire_kv_store_delete(store);
}

TEST_CASE("a sequence waits in host memory, and a snapshot keeps it there") {
  QuireKVCacheConfig config = config_of(8);
  config.num_host_blocks = 4;
  config.prefix_caching = 0;
  QuireKVCacheManager* manager = make_manager(config);
  Ids kv(32, -1), host(16, -2);
  const QuireSequenceId seq = create(manager, range(0, 15));
  compute(manager, seq, nullptr, kv);
  QuireBlockPair pairs[8];
  size_t size = 3;
  error_of(quire_kv_cache_manager_swap_out(manager, seq, pairs, &size));
  REQUIRE(quire_kv_cache_manager_swap_out(manager, seq, nullptr, &size) == QUIRE_OK);
  CHECK(size == 4);
  REQUIRE(quire_kv_cache_manager_swap_out(manager, seq, pairs, &size) == QUIRE_OK);
  REQUIRE(size == 4);
  for (size_t i = 0; i < size; ++i)
    std::copy_n(&kv[pairs[i].source * 4], 4, &host[pairs[i].destination * 4]);
  int32_t is_out = -1;
  REQUIRE(quire_kv_cache_manager_is_swapped_out(manager, seq, &is_out) == QUIRE_OK);
  CHECK(is_out == 1);
  CHECK(stats_of(manager).swapped_blocks == 4);
  CHECK(stats_of(manager).num_host_blocks == 4);

  const auto text = ask_twice<char>([&](char* buffer, size_t* count) {
    return quire_kv_cache_manager_snapshot(manager, buffer, count);
  });
  quire_kv_cache_manager_delete(manager);
  manager = nullptr;
  error_of(quire_kv_cache_manager_restore(text.data(), text.size() / 2, &manager));
  CHECK(manager == nullptr);
  REQUIRE(quire_kv_cache_manager_restore(text.data(), text.size(), &manager) == QUIRE_OK);

  const QuireSequenceId large = create(manager, range(100, 32));
  compute(manager, large, nullptr, kv);
  size = 8;
  CHECK(quire_kv_cache_manager_swap_in(manager, seq, pairs, &size) == QUIRE_OUT_OF_BLOCKS);
  CHECK(size == 8);
  error_of(quire_kv_cache_manager_swap_out(manager, seq, pairs, &size));
  free(manager, large);
  REQUIRE(quire_kv_cache_manager_swap_in(manager, seq, pairs, &size) == QUIRE_OK);
  REQUIRE(size == 4);
  for (size_t i = 0; i < size; ++i)
    std::copy_n(&host[pairs[i].source * 4], 4, &kv[pairs[i].destination * 4]);
  const auto table = ask_twice<int32_t>([&](int32_t* buffer, size_t* count) {
    return quire_kv_cache_manager_block_table(manager, seq, buffer, count);
  });
  REQUIRE(table.size() == 4);
  for (int32_t i = 0; i < 15; ++i) CHECK(kv[table[i / 4] * 4 + i % 4] == i);
  REQUIRE(quire_kv_cache_manager_validate(manager) == QUIRE_OK);
  quire_kv_cache_manager_delete(manager);
}
