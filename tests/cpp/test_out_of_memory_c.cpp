// SPDX-License-Identifier: Apache-2.0
// Memory runs out in calls of the C interface: they say so, and can be made again, or others first.
#include <cstring>
#include <vector>

#include "c_kv_case.h"
#include "out_of_memory.h"
#include "quire/quire.h"

namespace {

using namespace out_of_memory;

// Each time with one allocation more, until it works.
template <class Call>
void works_at_last(Call call) {
  QuireStatus status = QUIRE_OUT_OF_MEMORY;
  for (int64_t n = 0; status == QUIRE_OUT_OF_MEMORY; ++n) {
    allocations_left = n;
    status = call();
    allocations_left = -1;
    num_failures += status == QUIRE_OUT_OF_MEMORY;
  }
  REQUIRE_MESSAGE(status == QUIRE_OK, quire_last_error());
}

QuireKVCacheManager* make_manager_at_last(int32_t num_blocks) {
  const QuireKVCacheConfig config = c_kv_case::config_of(num_blocks);
  QuireKVCacheManager* manager = nullptr;
  works_at_last([&] { return quire_kv_cache_manager_new(&config, &manager); });
  return manager;
}

}  // namespace

TEST_CASE("out of memory in a scheduler's C interface") {
  num_failures = 0;
  QuireKVCacheManager* const manager = make_manager_at_last(12);
  QuireSchedulerConfig config = QUIRE_SCHEDULER_CONFIG_INIT;
  config.max_tokens_per_step = 16;
  QuireScheduler* scheduler = nullptr;
  works_at_last([&] { return quire_scheduler_new(manager, &config, &scheduler); });
  for (int32_t i = 0; i < 6; ++i) {
    const Ids prompt(7 + i, i);
    QuireRequest request = QUIRE_REQUEST_INIT;
    request.token_ids = prompt.data();
    request.num_tokens = prompt.size();
    request.max_new_tokens = 9;
    int32_t id = -1;
    works_at_last([&] { return quire_scheduler_add(scheduler, &request, &id); });
    CHECK(id == i);
  }
  size_t num_ended = 0;
  int64_t num_sampled = 0;
  while (num_ended < 6) {
    QuireScheduledBatch batch = QUIRE_SCHEDULED_BATCH_INIT;
    QuireStepBatch step = QUIRE_STEP_BATCH_INIT;
    works_at_last([&] { return quire_scheduler_schedule(scheduler, &batch, &step); });
    REQUIRE(batch.num_rows > 0);
    REQUIRE(step.total_q == batch.num_token_ids);
    num_sampled += batch.num_sampling;
    const Ids sampled(batch.num_sampling, 1);
    const int32_t* finished = nullptr;
    size_t num_finished = 0;
    works_at_last([&] {
      return quire_scheduler_commit(scheduler, sampled.data(), sampled.size(), &finished,
                                    &num_finished);
    });
    num_ended += num_finished;
    works_at_last([&] { return quire_scheduler_validate(scheduler); });
  }
  CHECK(num_sampled == 6 * 9);
  CHECK(num_failures > 200);
  quire_scheduler_delete(scheduler);
  quire_kv_cache_manager_delete(manager);
}

// A step that has failed has not been done, so that whichever comes next tells of all it did.
TEST_CASE("out of memory in a step of the C interface: nothing has changed") {
  num_failures = 0;
  QuireKVCacheManager* const manager = make_manager_at_last(64);
  const Ids tokens = c_kv_case::range(0, 30);
  QuireSequenceId seqs[2] = {c_kv_case::create(manager, tokens)};
  c_kv_case::step(manager, seqs[0]);
  const int32_t sampled[2] = {1, 2};
  REQUIRE(quire_kv_cache_manager_commit(manager, seqs, 1, sampled, nullptr) == QUIRE_OK);
  REQUIRE(quire_kv_cache_manager_fork(manager, seqs[0], &seqs[1]) == QUIRE_OK);
  const int32_t used_before = c_kv_case::stats_of(manager).used_blocks;

  const int32_t counts[2] = {1, 1};
  QuireStepBatch batch = QUIRE_STEP_BATCH_INIT;
  batch.lookahead = 60;  // the forks' blocks of their own, which no step had memory for yet
  const QuireStepBatch given = batch;
  QuireStatus status = QUIRE_OUT_OF_MEMORY;
  for (int64_t n = 0; status == QUIRE_OUT_OF_MEMORY; ++n) {
    allocations_left = n;
    status = quire_kv_cache_manager_step(manager, seqs, counts, 2, &batch);
    allocations_left = -1;
    if (status == QUIRE_OK) break;
    REQUIRE(status == QUIRE_OUT_OF_MEMORY);
    ++num_failures;
    CHECK(c_kv_case::stats_of(manager).used_blocks == used_before);
    CHECK(std::memcmp(&batch, &given, sizeof batch) == 0);
    CHECK(quire_kv_cache_manager_validate(manager) == QUIRE_OK);
  }
  CHECK(num_failures > 5);
  REQUIRE(batch.ticket == 2);
  REQUIRE(batch.num_copies == 1);  // the last holder writes in place
  CHECK(batch.copies[0] == c_kv_case::ask_twice<int32_t>([&](int32_t* ids, size_t* size) {
          return quire_kv_cache_manager_block_table(manager, seqs[1], ids, size);
        })[7]);
  CHECK(batch.num_changes == 2 * batch.max_blocks);
  quire_kv_cache_manager_delete(manager);
}

TEST_CASE("out of memory in the C interface of stores: no offer and no ticket is lost") {
  num_failures = 0;
  QuireKVStoreConfig config = QUIRE_KV_STORE_CONFIG_INIT;
  config.capacity_bytes = 64 * 16;
  config.block_bytes = 16;
  QuireKVStore* store = nullptr;
  works_at_last([&] { return quire_kv_store_new(&config, &store); });
  QuireKVCacheManager* const manager = make_manager_at_last(4);
  works_at_last([&] { return quire_kv_cache_manager_attach_store(manager, store); });
  int32_t num_offers = 0;
  for (int32_t i = 0; i < 5; ++i) {
    const Ids tokens(16, i);
    const QuirePrompt prompt = c_kv_case::prompt_of(tokens);
    QuireSequenceId seq;
    works_at_last([&] { return quire_kv_cache_manager_create(manager, &prompt, &seq); });
    const int32_t count = 16;
    QuireStepBatch step = QUIRE_STEP_BATCH_INIT;
    works_at_last([&] { return quire_kv_cache_manager_step(manager, &seq, &count, 1, &step); });
    const QuireKVTransfer* offers = nullptr;
    size_t size = 0;
    works_at_last([&] { return quire_kv_cache_manager_take_offloads(manager, &offers, &size); });
    CHECK(size == (i == 0 ? 0 : 4));
    for (size_t k = 0; k < size; ++k) {
      const char payload[16] = {};
      QuireKVTicket* ticket = nullptr;
      works_at_last([&] {
        return quire_kv_store_put(store, &offers[k].key, payload, sizeof payload, &ticket);
      });
      REQUIRE(ticket);
      int32_t outcome = -1;
      works_at_last([&] { return quire_kv_ticket_wait(ticket, &outcome); });
      CHECK(outcome == QUIRE_KV_DONE);
      quire_kv_ticket_delete(ticket);
      ++num_offers;
    }
    works_at_last(
        [&] { return quire_kv_cache_manager_commit(manager, &seq, 1, nullptr, nullptr); });
    works_at_last([&] { return quire_kv_cache_manager_free(manager, &seq, 1); });
  }
  CHECK(num_offers == 16);
  CHECK(num_failures > 40);
  quire_kv_cache_manager_delete(manager);
  quire_kv_store_delete(store);
}
