// SPDX-License-Identifier: Apache-2.0
// The scheduler, driven to the end: budget, chunks, admission, preemption, shared prompts.
#include <doctest/doctest.h>

#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "quire/error.h"
#include "quire/scheduler.h"

using quire::InvalidArgument;
using quire::KVCacheManager;
using quire::ScheduledBatch;
using quire::Scheduler;
using quire::SchedulerConfig;
using Ids = std::vector<int32_t>;

namespace {

Ids range(int32_t first, int32_t count) {
  Ids tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

template <class Array>
Ids ids_of(const Array& array) {
  return {array.begin(), array.end()};
}

// Runs a scheduler and remembers what each request generated. The model's next token is a function
// of the sequence's length, so that recomputed sequences must agree with themselves.
struct Runner {
  KVCacheManager manager;
  Scheduler scheduler;
  SchedulerConfig config;
  std::map<int32_t, Ids> generated;
  std::vector<int32_t> finished;

  Runner(int32_t num_blocks, int32_t block_size, SchedulerConfig config_ = {},
         bool prefix_caching = true, int32_t depth = 0)
      : manager(num_blocks, block_size, prefix_caching, depth),
        scheduler(manager, config_),
        config(config_) {}

  const ScheduledBatch* step() {
    const ScheduledBatch* batch = scheduler.schedule();
    scheduler.validate();
    if (!batch) return nullptr;
    CHECK(batch->token_ids.size() <= size_t(config.max_tokens_per_step));
    CHECK(batch->request_ids.size() <= size_t(config.max_seqs));
    Ids sampled;
    for (int32_t row : batch->sampling) {
      const int32_t token = 1000 * (1 + batch->request_ids[row]) + batch->step->seq_lens()[row];
      generated[batch->request_ids[row]].push_back(token);
      sampled.push_back(token);
    }
    for (int32_t id : scheduler.commit(sampled)) finished.push_back(id);
    scheduler.validate();
    return batch;
  }

  void run_to_the_end() {
    for (int turn = 0; scheduler.has_work(); ++turn) {
      REQUIRE(turn < 10'000);
      REQUIRE(step());
    }
    CHECK(manager.allocator().num_used() == 0);
  }

  // `length`: of the prompt.
  void check_output(int32_t id, int32_t length, int32_t count) {
    Ids expected(count);
    for (int32_t i = 0; i < count; ++i) expected[i] = 1000 * (1 + id) + length + i;
    CHECK(generated[id] == expected);
  }
};

}  // namespace

TEST_CASE("one request: a prompt, then a token a step") {
  Runner runner(8, 4);
  CHECK_FALSE(runner.scheduler.has_work());
  CHECK(runner.scheduler.schedule() == nullptr);
  CHECK(runner.scheduler.add(range(0, 6), 3) == 0);
  const ScheduledBatch* batch = runner.step();
  CHECK(ids_of(batch->token_ids) == range(0, 6));
  CHECK(ids_of(batch->sampling) == Ids{0});
  batch = runner.step();
  CHECK(ids_of(batch->token_ids) == Ids{1006});
  runner.run_to_the_end();
  CHECK(runner.finished == Ids{0});
  runner.check_output(0, 6, 3);
}

TEST_CASE("a long prompt is computed in chunks and samples only at its end") {
  Runner runner(16, 4, {.max_tokens_per_step = 10});
  runner.scheduler.add(range(0, 25), 2);
  for (int32_t expected : {10, 10, 5}) {
    const ScheduledBatch* batch = runner.step();
    CHECK(ids_of(batch->num_new_tokens) == Ids{expected});
    CHECK(batch->sampling.size() == (expected == 5 ? 1 : 0));
  }
  runner.run_to_the_end();
  runner.check_output(0, 25, 2);
}

TEST_CASE("running requests come before new ones; the budget is shared") {
  Runner runner(64, 4, {.max_tokens_per_step = 12});
  for (int32_t i = 0; i < 3; ++i) runner.scheduler.add(range(100 * i, 8), 4);
  const ScheduledBatch* batch = runner.step();
  CHECK(ids_of(batch->request_ids) == Ids{0, 1});
  CHECK(ids_of(batch->num_new_tokens) == Ids{8, 4});
  batch = runner.step();
  CHECK(ids_of(batch->request_ids) == Ids{0, 1, 2});
  CHECK(ids_of(batch->num_new_tokens) == Ids{1, 4, 7});
  CHECK(ids_of(batch->sampling) == Ids{0, 1});
  runner.run_to_the_end();
  for (int32_t i = 0; i < 3; ++i) runner.check_output(i, 8, 4);
}

TEST_CASE("max_seqs bounds the running requests") {
  Runner runner(64, 4, {.max_seqs = 2});
  for (int32_t i = 0; i < 5; ++i) runner.scheduler.add(range(100 * i, 5), 3);
  runner.step();
  CHECK(runner.scheduler.num_running() == 2);
  CHECK(runner.scheduler.num_waiting() == 3);
  runner.run_to_the_end();
  CHECK(runner.finished == Ids{0, 1, 2, 3, 4});
}

TEST_CASE("admission leaves the watermark free, unless nothing runs") {
  Runner runner(10, 4, {.watermark = 0.3});
  runner.scheduler.add(range(0, 30), 8);   // 8 of 10 blocks
  runner.scheduler.add(range(100, 4), 2);  // would leave 1 free
  runner.step();
  CHECK(runner.scheduler.num_running() == 1);
  runner.run_to_the_end();
  CHECK(runner.scheduler.num_preemptions() == 0);
}

TEST_CASE("the latest request is preempted, waits first in line and keeps its tokens") {
  Runner runner(6, 4, {.watermark = 0}, false);
  runner.scheduler.add(range(0, 8), 12);
  runner.scheduler.add(range(100, 8), 12);
  runner.scheduler.add(range(200, 8), 4);
  int32_t num_preempted = 0;
  while (runner.scheduler.num_preemptions() == 0) {
    const ScheduledBatch* batch = runner.step();
    REQUIRE(batch);
    num_preempted += batch->num_preempted;
  }
  CHECK(num_preempted == 1);
  CHECK(runner.scheduler.num_running() >= 1);
  runner.run_to_the_end();
  CHECK(runner.finished == Ids{0, 1, 2});
  runner.check_output(0, 8, 12);
  runner.check_output(1, 8, 12);
  runner.check_output(2, 8, 4);
}

TEST_CASE("identical prompts in flight are computed once") {
  Runner runner(64, 4, {.max_tokens_per_step = 16});
  runner.scheduler.add(range(0, 40), 2);
  runner.scheduler.add(range(0, 40), 2);
  Ids longer = range(0, 36);
  longer.push_back(7);
  runner.scheduler.add(longer, 2);
  size_t num_computed = 0;
  while (runner.scheduler.has_work()) num_computed += runner.step()->token_ids.size();
  // All of the first prompt, the last token of the others, and one decoded token each.
  CHECK(num_computed == 40 + 1 + 1 + 3);
  for (int32_t i = 0; i < 2; ++i) runner.check_output(i, 40, 2);
}

TEST_CASE("requests of different salts don't wait for each other") {
  Runner runner(64, 4);
  runner.scheduler.add(range(0, 40), 2, "a");
  runner.scheduler.add(range(0, 40), 2, "b");
  CHECK(runner.step()->request_ids.size() == 2);
  runner.run_to_the_end();
}

TEST_CASE("a leader that ends early sets its followers free") {
  Runner runner(64, 4, {.max_tokens_per_step = 8});
  runner.scheduler.add(range(0, 40), 2);
  runner.scheduler.add(range(0, 40), 2);
  runner.step();
  runner.scheduler.finish(0);
  const ScheduledBatch* batch = runner.step();
  CHECK(ids_of(batch->request_ids) == Ids{1});
  CHECK(batch->step->seq_lens()[0] == 16);  // what the leader computed is found
  runner.run_to_the_end();
}

TEST_CASE("finish in every state") {
  Runner runner(64, 4, {.max_seqs = 2});
  for (int32_t i = 0; i < 4; ++i) runner.scheduler.add(range(100 * i, 5), 3);
  runner.scheduler.finish(3);  // waiting
  runner.step();
  runner.scheduler.finish(0);  // running
  const ScheduledBatch* batch = runner.scheduler.schedule();
  CHECK(ids_of(batch->request_ids) == Ids{1, 2});
  runner.scheduler.finish(1);  // in the step
  CHECK(runner.scheduler.num_running() == 1);
  CHECK(runner.scheduler.commit(Ids{7, 8}).empty());
  runner.scheduler.validate();
  runner.scheduler.finish(1);  // ended
  runner.run_to_the_end();
  CHECK(runner.finished == Ids{2});
  CHECK_THROWS_AS(runner.scheduler.finish(4), InvalidArgument);
}

TEST_CASE("wrong arguments are refused by name and change nothing") {
  Runner runner(4, 4);
  Scheduler& scheduler = runner.scheduler;
  CHECK_THROWS_WITH_AS(scheduler.add(range(0, 14), 3),
                       "add: token_ids: expected a prompt and max_new_tokens that fit 4 blocks of "
                       "4, got 14 + 3 tokens",
                       InvalidArgument);
  CHECK_THROWS_AS(scheduler.add(range(0, 4), 0), InvalidArgument);
  CHECK_THROWS_AS(scheduler.add({}, 1), InvalidArgument);
  CHECK_THROWS_AS(scheduler.commit({}), InvalidArgument);
  CHECK_THROWS_AS(Scheduler(runner.manager, {.max_tokens_per_step = 0}), InvalidArgument);
  CHECK_THROWS_AS(Scheduler(runner.manager, {.max_seqs = 0}), InvalidArgument);
  CHECK_THROWS_AS(Scheduler(runner.manager, {.watermark = 1.0}), InvalidArgument);
  CHECK(scheduler.add(range(0, 14), 2) == 0);
  scheduler.schedule();
  CHECK_THROWS_AS(scheduler.schedule(), InvalidArgument);
  CHECK_THROWS_AS(scheduler.commit(Ids{1, 2}), InvalidArgument);
  CHECK(scheduler.commit(Ids{1}).empty());
  runner.run_to_the_end();
}

TEST_CASE("a scheduler gives its blocks back when it goes") {
  KVCacheManager manager(8, 4);
  {
    Scheduler scheduler(manager);
    scheduler.add(range(0, 9), 2);
    scheduler.add(range(50, 9), 2);
    scheduler.schedule();
    CHECK(manager.allocator().num_used() > 0);
  }
  CHECK(manager.allocator().num_used() == 0);
  CHECK(manager.num_sequences() == 0);
}

TEST_CASE("with steps in flight a lack of blocks is a pause, not a wave of preemptions") {
  Runner runner(6, 4, {.watermark = 0}, false, 2);
  for (int32_t i = 0; i < 3; ++i) runner.scheduler.add(range(100 * i, 6), 8);
  int64_t last = 0, retired = 0;
  for (int turn = 0; runner.scheduler.has_work(); ++turn) {
    REQUIRE(turn < 1000);
    if (last - retired == 2) runner.manager.retire(++retired);
    if (const ScheduledBatch* batch = runner.step())
      last = batch->step->ticket();
    else if (retired < last)
      runner.manager.retire(++retired);
  }
  while (retired < last) runner.manager.retire(++retired);
  CHECK(runner.manager.allocator().num_used() == 0);
  for (int32_t i = 0; i < 3; ++i) runner.check_output(i, 6, 8);
}

TEST_CASE("too many steps in flight are refused before anything is planned") {
  Runner runner(8, 4, {}, false, 1);
  runner.scheduler.add(range(0, 6), 3);
  runner.step();
  runner.scheduler.add(range(0, 6), 3);
  CHECK_THROWS_AS(runner.scheduler.schedule(), InvalidArgument);
  CHECK(runner.scheduler.num_waiting() == 1);
  runner.manager.retire(1);
  CHECK(runner.step() != nullptr);
}

TEST_CASE("random traffic through a small pool ends, and every token is generated once") {
  for (bool prefix_caching : {true, false})
    for (uint32_t seed = 0; seed < 40; ++seed) {
      std::mt19937 random(seed);
      const int32_t block_size = 1 + static_cast<int32_t>(random() % 8);
      const int32_t num_blocks = 64 / block_size + 1;
      Runner runner(num_blocks, block_size,
                    {.max_tokens_per_step = 1 + static_cast<int32_t>(random() % 20),
                     .max_seqs = 1 + static_cast<int32_t>(random() % 6),
                     .watermark = (random() % 3) * 0.1},
                    prefix_caching);
      std::vector<std::pair<int32_t, int32_t>> requests;  // prompt length, new tokens
      for (int32_t i = 0; i < 12; ++i) {
        requests.emplace_back(1 + random() % 40, 1 + random() % 20);
        Ids prompt = range(0, requests.back().first);
        if (random() % 2) prompt.back() = static_cast<int32_t>(random() % 1000);
        runner.scheduler.add(prompt, requests.back().second);
        if (random() % 2) runner.step();
      }
      runner.run_to_the_end();
      for (int32_t i = 0; i < 12; ++i)
        runner.check_output(i, requests[i].first, requests[i].second);
    }
}
