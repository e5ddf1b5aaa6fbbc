// SPDX-License-Identifier: Apache-2.0
// The C interface of layer groups, and of what schedulers other than quire's ask a manager.
#include <doctest/doctest.h>

#include <atomic>
#include <cstddef>
#include <thread>

#include "c_kv_case.h"

using namespace c_kv_case;

namespace {

constexpr QuireLayerGroup kGroups[] = {
    {QUIRE_FULL, 0}, {QUIRE_SLIDING_WINDOW, 5}, {QUIRE_CHUNKED_LOCAL, 8}, {QUIRE_STATE, 0}};

QuireKVCacheConfig grouped_config() {
  QuireKVCacheConfig config = config_of(64);
  config.num_groups = 4;
  config.groups = kGroups;
  return config;
}

QuireKVCacheInfo manager_info(const QuireKVCacheManager* manager) {
  QuireKVCacheInfo info = QUIRE_KV_CACHE_INFO_INIT;
  REQUIRE(quire_kv_cache_manager_info(manager, &info) == QUIRE_OK);
  return info;
}

Ids table_of(const QuireKVCacheManager* manager, QuireSequenceId seq, int32_t group) {
  return ask_twice<int32_t>([&](int32_t* buffer, size_t* size) {
    return quire_kv_cache_manager_group_block_table(manager, seq, group, buffer, size);
  });
}

}  // namespace

TEST_CASE("each layer group has arrays and a table of its own") {
  QuireKVCacheManager* manager = make_manager(grouped_config());
  const auto groups = ask_twice<QuireLayerGroup>([&](QuireLayerGroup* buffer, size_t* size) {
    return quire_kv_cache_manager_groups(manager, buffer, size);
  });
  REQUIRE(groups.size() == 4);
  for (size_t i = 0; i < 4; ++i) {
    CHECK(groups[i].kind == kGroups[i].kind);
    CHECK(groups[i].size == kGroups[i].size);
  }
  const QuireSequenceId seq = create(manager, range(0, 18));
  const QuireStepBatch batch = step(manager, seq);
  for (int32_t group = 0; group < 4; ++group) {
    QuireStepBatch arrays = QUIRE_STEP_BATCH_INIT;
    REQUIRE(quire_kv_cache_manager_group_batch(manager, group, &arrays) == QUIRE_OK);
    CHECK(arrays.ticket == batch.ticket);
    CHECK(arrays.total_q == 18);
    CHECK(arrays.seq_lens[0] == 18);
    CHECK(arrays.positions[17] == 17);
    const Ids table = table_of(manager, seq, group);
    if (kGroups[group].kind == QUIRE_STATE) {
      CHECK(arrays.slot_mapping == nullptr);
      CHECK(table.size() == 1);
      CHECK(arrays.block_table[0] == table[0]);
      continue;
    }
    REQUIRE(table.size() == 5);
    CHECK(arrays.slot_mapping[17] == table[4] * 4 + 1);
    CHECK(arrays.block_table[4] == table[4]);
    if (group == 0) CHECK(arrays.block_table == batch.block_table);
  }
  commit(manager, seq);
  CHECK(table_of(manager, seq, 1)[0] == -1);  // the window has moved on
  CHECK(table_of(manager, seq, 0)[0] >= 0);

  const auto stats = ask_twice<QuireLayerGroupStats>([&](QuireLayerGroupStats* b, size_t* size) {
    return quire_kv_cache_manager_group_stats(manager, b, size);
  });
  REQUIRE(stats.size() == 4);
  CHECK(stats[0].used_blocks == 5);
  CHECK(stats[1].used_blocks < 5);
  CHECK(stats[3].used_blocks == 1);
  const QuireKVCacheInfo info = manager_info(manager);
  CHECK(info.num_groups == 4);
  CHECK(info.num_sequences == 1);
  CHECK(info.prefix_caching == 1);
  CHECK(info.caches_states == 1);
  CHECK(info.num_bytes > 0);
  REQUIRE(quire_kv_cache_manager_validate(manager) == QUIRE_OK);
  quire_kv_cache_manager_delete(manager);
}

TEST_CASE("wrong groups and options are refused") {
  QuireKVCacheManager* manager = make_manager(grouped_config());
  const QuireSequenceId seq = create(manager, range(0, 18));
  size_t size = 0;
  CHECK(error_of(quire_kv_cache_manager_group_block_table(manager, seq, 4, nullptr, &size)) ==
        "block_table: group: expected 0 to 3, got 4");
  QuireStepBatch batch = QUIRE_STEP_BATCH_INIT;
  CHECK(error_of(quire_kv_cache_manager_group_batch(manager, -1, &batch)) ==
        "quire_kv_cache_manager_group_batch: group: expected 0 to 3, got -1");
  QuireLayerGroup groups[3];
  size = 3;
  CHECK(error_of(quire_kv_cache_manager_groups(manager, groups, &size)) ==
        "quire_kv_cache_manager_groups: size: expected room for 4 elements, got 3");
  quire_kv_cache_manager_delete(manager);

  QuireKVCacheConfig config = grouped_config();
  const auto error = [&] { return error_of(quire_kv_cache_manager_new(&config, &manager)); };
  QuireKVCacheManager* const before = manager;
  const QuireLayerGroup unknown[] = {{QUIRE_FULL, 0}, {4, 0}};
  config.groups = unknown;
  config.num_groups = 2;
  CHECK(error() ==
        "quire_kv_cache_manager_new: config.groups[1].kind: expected a QuireLayerGroupKind, got 4");
  config.groups = nullptr;
  CHECK(error() == "quire_kv_cache_manager_new: config.groups: expected 2 elements, got NULL");
  config.num_groups = -1;
  CHECK(error() == "quire_kv_cache_manager_new: config.num_groups: expected 0 or more, got -1");
  config.num_groups = 0;
  config.eviction = 2;
  CHECK(error() == "quire_kv_cache_manager_new: config.eviction: expected a QuireEviction, got 2");
  config.eviction = QUIRE_REUSE_LRU;
  config.event_capacity = -1;
  CHECK(error().find("event_capacity") != std::string::npos);
  CHECK(manager == before);

  // An older header knew nothing behind async_depth.
  config.struct_size = offsetof(QuireKVCacheConfig, eviction);
  manager = make_manager(config);
  CHECK(manager_info(manager).num_groups == 1);
  quire_kv_cache_manager_delete(manager);
}

TEST_CASE("classes of reuse take memory of their own") {
  QuireKVCacheConfig config = config_of(1000);
  QuireKVCacheManager* lru = make_manager(config);
  config.eviction = QUIRE_REUSE_LRU;
  QuireKVCacheManager* reuse = make_manager(config);
  CHECK(manager_info(reuse).num_bytes >= manager_info(lru).num_bytes + 16 * 1000);
  quire_kv_cache_manager_delete(lru);
  quire_kv_cache_manager_delete(reuse);
}

TEST_CASE("a scheduler of one's own") {
  QuireKVCacheConfig config = config_of(16);
  config.async_depth = 1;
  QuireKVCacheManager* manager = make_manager(config);
  const Ids tokens = range(5, 9);
  const QuirePrompt prompt = prompt_of(tokens);
  QuireSequenceId a, b;
  REQUIRE(quire_kv_cache_manager_open(manager, &prompt, &a) == QUIRE_OK);
  REQUIRE(quire_kv_cache_manager_open(manager, &prompt, &b) == QUIRE_OK);
  CHECK(stats_of(manager).used_blocks == 0);
  int64_t count = 0;
  REQUIRE(quire_kv_cache_manager_shareable_tokens(manager, a, b, &count) == QUIRE_OK);
  CHECK(count == 8);
  int32_t missing = 0;
  REQUIRE(quire_kv_cache_manager_num_missing_blocks(manager, a, 9, 9, &missing) == QUIRE_OK);
  CHECK(missing == 3);
  REQUIRE(quire_kv_cache_manager_num_blocks_for(manager, 17, 17, &count) == QUIRE_OK);
  CHECK(count == 5);

  int32_t may_step = -1;
  REQUIRE(quire_kv_cache_manager_may_step(manager, &may_step) == QUIRE_OK);
  CHECK(may_step == 1);
  REQUIRE(quire_kv_cache_manager_attach(manager, a) == QUIRE_OK);
  const QuireStepBatch batch = step(manager, a);
  REQUIRE(quire_kv_cache_manager_may_step(manager, &may_step) == QUIRE_OK);
  CHECK(may_step == 0);
  commit(manager, a);
  REQUIRE(quire_kv_cache_manager_retire(manager, batch.ticket) == QUIRE_OK);

  QuirePrefixMatch match = QUIRE_PREFIX_MATCH_INIT;
  REQUIRE(quire_kv_cache_manager_match_sequence(manager, b, &match) == QUIRE_OK);
  CHECK(match.num_tokens == 8);
  CHECK(match.num_blocks == 2);
  CHECK(match.num_idle_blocks == 0);
  REQUIRE(quire_kv_cache_manager_attach(manager, b) == QUIRE_OK);
  const auto pending = [&] {
    return ask_twice<int32_t>([&](int32_t* buffer, size_t* size) {
      return quire_kv_cache_manager_pending_tokens(manager, b, buffer, size);
    });
  };
  CHECK(pending() == Ids{13});
  REQUIRE(quire_kv_cache_manager_detach(manager, b) == QUIRE_OK);
  CHECK(pending() == tokens);
  const auto all = ask_twice<QuireSequenceId>([&](QuireSequenceId* buffer, size_t* size) {
    return quire_kv_cache_manager_sequences(manager, buffer, size);
  });
  REQUIRE(all.size() == 2);
  CHECK(all[0].value + all[1].value == a.value + b.value);
  CHECK(error_of(quire_kv_cache_manager_attach(manager, a)).find("attach") != std::string::npos);
  free(manager, b);
  CHECK(error_of(quire_kv_cache_manager_detach(manager, b)).find("seq") != std::string::npos);
  quire_kv_cache_manager_delete(manager);
}

TEST_CASE("a lock makes several calls one") {
  QuireKVCacheManager* manager = make_manager(config_of(16));
  CHECK(error_of(quire_kv_cache_manager_unlock(manager)) ==
        "quire_kv_cache_manager_unlock: manager: expected one that this thread has locked, got one "
        "that it has not");
  REQUIRE(quire_kv_cache_manager_lock(manager) == QUIRE_OK);
  REQUIRE(quire_kv_cache_manager_lock(manager) == QUIRE_OK);
  std::atomic<bool> is_created = false;
  std::thread other([&] {
    const Ids tokens = range(0, 4);
    const QuirePrompt prompt = prompt_of(tokens);
    QuireSequenceId seq;
    quire_kv_cache_manager_create(manager, &prompt, &seq);
    is_created = true;
  });
  create(manager, range(0, 5));
  REQUIRE(quire_kv_cache_manager_unlock(manager) == QUIRE_OK);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK_FALSE(is_created);
  CHECK(manager_info(manager).num_sequences == 1);
  REQUIRE(quire_kv_cache_manager_unlock(manager) == QUIRE_OK);
  other.join();
  CHECK(manager_info(manager).num_sequences == 2);
  error_of(quire_kv_cache_manager_unlock(manager));
  quire_kv_cache_manager_delete(manager);
}

TEST_CASE("NULL is refused") {
  QuireKVCacheManager* manager = make_manager(config_of(16));
  const QuireSequenceId seq = create(manager, range(0, 5));
  const QuirePrompt prompt = QUIRE_PROMPT_INIT;
  const auto names = [](QuireStatus status, const std::string& argument) {
    return error_of(status).find(argument + ": expected a pointer, got NULL") != std::string::npos;
  };
  CHECK(names(quire_kv_cache_manager_lock(nullptr), "manager"));
  CHECK(names(quire_kv_cache_manager_unlock(nullptr), "manager"));
  CHECK(names(quire_kv_cache_manager_groups(manager, nullptr, nullptr), "size"));
  CHECK(names(quire_kv_cache_manager_group_stats(manager, nullptr, nullptr), "size"));
  CHECK(names(quire_kv_cache_manager_group_batch(manager, 0, nullptr), "batch"));
  CHECK(names(quire_kv_cache_manager_info(manager, nullptr), "info"));
  CHECK(names(quire_kv_cache_manager_may_step(manager, nullptr), "may_step"));
  CHECK(names(quire_kv_cache_manager_open(manager, &prompt, nullptr), "seq"));
  CHECK(names(quire_kv_cache_manager_attach(nullptr, seq), "manager"));
  CHECK(names(quire_kv_cache_manager_detach(nullptr, seq), "manager"));
  CHECK(names(quire_kv_cache_manager_match_sequence(manager, seq, nullptr), "match"));
  CHECK(names(quire_kv_cache_manager_sequences(manager, nullptr, nullptr), "size"));
  CHECK(names(quire_kv_cache_manager_pending_tokens(manager, seq, nullptr, nullptr), "size"));
  CHECK(names(quire_kv_cache_manager_shareable_tokens(manager, seq, seq, nullptr), "num_tokens"));
  CHECK(
      names(quire_kv_cache_manager_num_missing_blocks(manager, seq, 1, 1, nullptr), "num_blocks"));
  CHECK(names(quire_kv_cache_manager_num_blocks_for(manager, 1, 1, nullptr), "num_blocks"));
  quire_kv_cache_manager_delete(manager);
}
