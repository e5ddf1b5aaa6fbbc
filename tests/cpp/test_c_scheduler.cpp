// SPDX-License-Identifier: Apache-2.0
// The C interface of the KV runtime beyond one sequence's life: forks, pins, tokens, the scheduler.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "quire/quire.h"

using Ids = std::vector<int32_t>;

namespace {

QuireKVCacheManager* make_manager(int32_t num_blocks) {
  QuireKVCacheConfig config = QUIRE_KV_CACHE_CONFIG_INIT;
  config.num_blocks = num_blocks;
  config.block_size = 4;
  QuireKVCacheManager* manager = nullptr;
  REQUIRE(quire_kv_cache_manager_new(&config, &manager) == QUIRE_OK);
  return manager;
}

Ids range(int32_t first, int32_t count) {
  Ids tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

int32_t add(QuireScheduler* scheduler, const Ids& tokens, int32_t count, int32_t priority = 0,
            const std::string& tenant = "") {
  QuireRequest request = QUIRE_REQUEST_INIT;
  request.token_ids = tokens.data();
  request.num_tokens = tokens.size();
  request.max_new_tokens = count;
  request.priority = priority;
  request.tenant = tenant.data();
  request.tenant_size = tenant.size();
  int32_t id = -1;
  REQUIRE(quire_scheduler_add(scheduler, &request, &id) == QUIRE_OK);
  return id;
}

QuireSchedulerInfo info_of(const QuireScheduler* scheduler) {
  QuireSchedulerInfo info = QUIRE_SCHEDULER_INFO_INIT;
  REQUIRE(quire_scheduler_info(scheduler, &info) == QUIRE_OK);
  REQUIRE(quire_scheduler_validate(scheduler) == QUIRE_OK);
  return info;
}

}  // namespace

TEST_CASE("many children, their tokens, and pins of a sequence") {
  QuireKVCacheManager* manager = make_manager(16);
  const Ids tokens = range(5, 9);
  QuirePrompt prompt = QUIRE_PROMPT_INIT;
  prompt.token_ids = tokens.data();
  prompt.num_tokens = tokens.size();
  QuireSequenceId seq;
  REQUIRE(quire_kv_cache_manager_create(manager, &prompt, &seq) == QUIRE_OK);
  QuireStepBatch step = QUIRE_STEP_BATCH_INIT;
  const int32_t count = 9;
  REQUIRE(quire_kv_cache_manager_step(manager, &seq, &count, 1, &step) == QUIRE_OK);
  REQUIRE(quire_kv_cache_manager_commit(manager, &seq, 1, nullptr, nullptr) == QUIRE_OK);

  std::vector<QuireSequenceId> children(3);
  REQUIRE(quire_kv_cache_manager_fork_many(manager, seq, children.data(), 3) == QUIRE_OK);
  size_t size = 0;
  REQUIRE(quire_kv_cache_manager_token_ids(manager, children[2], nullptr, &size) == QUIRE_OK);
  Ids held(size);
  REQUIRE(quire_kv_cache_manager_token_ids(manager, children[2], held.data(), &size) == QUIRE_OK);
  CHECK(held == tokens);

  int64_t num_pinned = 0;
  REQUIRE(quire_kv_cache_manager_pin_sequence(manager, seq, &num_pinned) == QUIRE_OK);
  CHECK(num_pinned == 8);
  REQUIRE(quire_kv_cache_manager_free(manager, children.data(), 3) == QUIRE_OK);
  REQUIRE(quire_kv_cache_manager_unpin_sequence(manager, seq, &num_pinned) == QUIRE_OK);
  CHECK(num_pinned == 8);
  REQUIRE(quire_kv_cache_manager_free(manager, &seq, 1) == QUIRE_OK);

  CHECK(quire_kv_cache_manager_fork_many(manager, seq, children.data(), 3) ==
        QUIRE_INVALID_ARGUMENT);
  CHECK(std::string(quire_last_error()).find("expected a live sequence") != std::string::npos);
  CHECK(quire_kv_cache_manager_fork_many(manager, seq, nullptr, 3) == QUIRE_INVALID_ARGUMENT);
  CHECK(quire_kv_cache_manager_pin_sequence(manager, seq, nullptr) == QUIRE_INVALID_ARGUMENT);
  quire_kv_cache_manager_delete(manager);
}

TEST_CASE("requests from the first to the last token") {
  QuireKVCacheManager* manager = make_manager(32);
  QuireSchedulerConfig config = QUIRE_SCHEDULER_CONFIG_INIT;
  config.max_seqs = 2;
  QuireScheduler* scheduler = nullptr;
  REQUIRE(quire_scheduler_new(manager, &config, &scheduler) == QUIRE_OK);
  CHECK(add(scheduler, range(0, 6), 3) == 0);
  CHECK(add(scheduler, range(100, 5), 2, 1) == 1);
  CHECK(add(scheduler, range(200, 7), 2, 1, "other") == 2);
  CHECK(info_of(scheduler).num_waiting == 3);

  Ids order;
  int64_t num_computed = 0;
  QuireScheduledBatch batch = QUIRE_SCHEDULED_BATCH_INIT;
  QuireStepBatch step = QUIRE_STEP_BATCH_INIT;
  for (;;) {
    REQUIRE(quire_scheduler_schedule(scheduler, &batch, &step) == QUIRE_OK);
    if (batch.num_rows == 0) break;
    CHECK(batch.num_rows <= 2);
    CHECK(step.batch_size == batch.num_rows);
    CHECK(step.total_q == batch.num_token_ids);
    CHECK(std::accumulate(batch.num_new_tokens, batch.num_new_tokens + batch.num_rows,
                          int64_t{0}) == batch.num_token_ids);
    num_computed += batch.num_token_ids;
    const Ids sampled(static_cast<size_t>(batch.num_sampling), 9);
    const int32_t* finished = nullptr;
    size_t num_finished = 0;
    REQUIRE(quire_scheduler_commit(scheduler, sampled.data(), sampled.size(), &finished,
                                   &num_finished) == QUIRE_OK);
    order.insert(order.end(), finished, finished + num_finished);
  }
  CHECK(order == Ids{1, 2, 0});  // the higher priority first
  CHECK(num_computed == (6 + 2) + (5 + 1) + (7 + 1));
  CHECK(info_of(scheduler).num_running == 0);

  size_t size = 0;
  REQUIRE(quire_scheduler_explain(scheduler, nullptr, &size) == QUIRE_OK);
  std::string text(size, '?');
  REQUIRE(quire_scheduler_explain(scheduler, text.data(), &size) == QUIRE_OK);
  CHECK(text.find("no request waits") != std::string::npos);
  quire_scheduler_delete(scheduler);
  quire_kv_cache_manager_delete(manager);
}

TEST_CASE("wrong calls of the scheduler change nothing") {
  QuireKVCacheManager* manager = make_manager(4);
  QuireSchedulerConfig config = QUIRE_SCHEDULER_CONFIG_INIT;
  config.max_seqs = 0;
  QuireScheduler* scheduler = nullptr;
  CHECK(quire_scheduler_new(manager, &config, &scheduler) == QUIRE_INVALID_ARGUMENT);
  CHECK(std::string(quire_last_error()).find("max_seqs") != std::string::npos);
  CHECK(quire_scheduler_new(nullptr, &config, &scheduler) == QUIRE_INVALID_ARGUMENT);
  config.max_seqs = 2;
  CHECK(quire_scheduler_new(manager, &config, nullptr) == QUIRE_INVALID_ARGUMENT);
  REQUIRE(quire_scheduler_new(manager, &config, &scheduler) == QUIRE_OK);
  QuireRequest request = QUIRE_REQUEST_INIT;
  int32_t id = -7;
  CHECK(quire_scheduler_add(scheduler, &request, &id) == QUIRE_INVALID_ARGUMENT);
  CHECK(id == -7);
  CHECK(add(scheduler, range(0, 5), 2) == 0);
  CHECK(quire_scheduler_finish(scheduler, 1) == QUIRE_INVALID_ARGUMENT);
  const int32_t* finished = nullptr;
  size_t num_finished = 0;
  CHECK(quire_scheduler_commit(scheduler, nullptr, 0, &finished, &num_finished) ==
        QUIRE_INVALID_ARGUMENT);
  QuireScheduledBatch batch = QUIRE_SCHEDULED_BATCH_INIT;
  CHECK(quire_scheduler_schedule(scheduler, &batch, nullptr) == QUIRE_INVALID_ARGUMENT);
  CHECK(info_of(scheduler).num_waiting == 1);  // nothing was planned
  CHECK(quire_scheduler_finish(scheduler, 0) == QUIRE_OK);
  CHECK(info_of(scheduler).num_waiting == 0);
  quire_scheduler_delete(scheduler);
  quire_scheduler_delete(nullptr);
  quire_kv_cache_manager_delete(manager);
}

TEST_CASE("a preempted request waits in host memory, and what clear_cache gave up is removed") {
  QuireKVCacheConfig cache = QUIRE_KV_CACHE_CONFIG_INIT;
  cache.num_blocks = 6;
  cache.block_size = 4;
  cache.num_host_blocks = 8;
  cache.event_capacity = 100;
  QuireKVCacheManager* manager = nullptr;
  REQUIRE(quire_kv_cache_manager_new(&cache, &manager) == QUIRE_OK);
  QuireSchedulerConfig config = QUIRE_SCHEDULER_CONFIG_INIT;
  config.watermark = 0;
  config.seconds_per_token = 1;
  config.bytes_per_second = 1;
  QuireScheduler* scheduler = nullptr;
  REQUIRE(quire_scheduler_new(manager, &config, &scheduler) == QUIRE_OK);
  add(scheduler, range(0, 8), 12);
  add(scheduler, range(100, 8), 12);
  int64_t num_out = 0, num_in = 0;
  std::vector<int32_t> device(24, -1), host(32, -1);  // a number a slot: the token
  for (QuireSchedulerInfo info = info_of(scheduler); info.num_running + info.num_waiting > 0;
       info = info_of(scheduler)) {
    QuireScheduledBatch batch = QUIRE_SCHEDULED_BATCH_INIT;
    QuireStepBatch step = QUIRE_STEP_BATCH_INIT;
    REQUIRE(quire_scheduler_schedule(scheduler, &batch, &step) == QUIRE_OK);
    for (int64_t i = 0; i < batch.num_swap_out; ++i)
      std::copy_n(&device[4 * batch.swap_out[i].source], 4,
                  &host[4 * batch.swap_out[i].destination]);
    for (int64_t i = 0; i < batch.num_swap_in; ++i)
      std::copy_n(&host[4 * batch.swap_in[i].source], 4, &device[4 * batch.swap_in[i].destination]);
    num_out += batch.num_swap_out;
    num_in += batch.num_swap_in;
    for (int64_t i = 0; i < batch.num_token_ids; ++i)
      device[step.slot_mapping[i]] = batch.token_ids[i];
    for (int64_t row = 0; row < batch.num_rows; ++row) {  // the prompt is where it belongs
      const int32_t* table = step.block_table + row * step.block_table_stride;
      for (int32_t t = 0; t < 8; ++t)
        CHECK(device[4 * table[t / 4] + t % 4] == 100 * batch.request_ids[row] + t);
    }
    const Ids sampled(batch.num_sampling, 7);
    const int32_t* finished = nullptr;
    size_t num_finished = 0;
    REQUIRE(quire_scheduler_commit(scheduler, sampled.data(), sampled.size(), &finished,
                                   &num_finished) == QUIRE_OK);
  }
  CHECK(num_out > 0);
  CHECK(num_in > 0);
  CHECK(num_in <= num_out);
  quire_scheduler_delete(scheduler);

  std::vector<QuireCacheEvent> events(100);
  size_t size = events.size();
  REQUIRE(quire_kv_cache_manager_take_events(manager, events.data(), &size) == QUIRE_OK);
  size_t num_cached = 0;
  REQUIRE(quire_kv_cache_manager_cached_blocks(manager, nullptr, &num_cached) == QUIRE_OK);
  CHECK(num_cached > 0);
  int32_t num_cleared = 0;
  REQUIRE(quire_kv_cache_manager_clear_cache(manager, &num_cleared) == QUIRE_OK);
  CHECK(num_cleared == static_cast<int32_t>(num_cached));
  size = events.size();
  REQUIRE(quire_kv_cache_manager_take_events(manager, events.data(), &size) == QUIRE_OK);
  CHECK(size == num_cached);
  for (size_t i = 0; i < size; ++i) CHECK(events[i].kind == QUIRE_EVENT_REMOVED);
  CHECK(quire_kv_cache_manager_clear_cache(manager, nullptr) == QUIRE_INVALID_ARGUMENT);
  quire_kv_cache_manager_delete(manager);
}
