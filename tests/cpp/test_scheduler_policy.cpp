// SPDX-License-Identifier: Apache-2.0
// Who comes next: priorities, tenants, prefixes, the bound on overtaking; what explain() says; and
// what preemption costs.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "quire/error.h"
#include "quire/preemption.h"
#include "quire/scheduler.h"

using quire::KVCacheManager;
using quire::RequestQueue;
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

int32_t take(RequestQueue& queue) {
  const int32_t slot = queue.next(1)[0];
  queue.pop(slot);
  return slot;
}

struct Outcome {
  Ids finished;              // in order
  Ids admitted;              // in order of their first token
  std::string explanations;  // of all steps
};

// Runs to the end; the budget and max_seqs hold in every step.
Outcome run(Scheduler& scheduler, const SchedulerConfig& config) {
  Outcome outcome;
  for (int turn = 0; scheduler.has_work(); ++turn) {
    REQUIRE(turn < 20'000);
    const ScheduledBatch* batch = scheduler.schedule();
    REQUIRE(batch);
    outcome.explanations += scheduler.explain();
    REQUIRE(batch->token_ids.size() <= size_t(config.max_tokens_per_step));
    REQUIRE(batch->request_ids.size() <= size_t(config.max_seqs));
    REQUIRE(std::accumulate(batch->num_new_tokens.begin(), batch->num_new_tokens.end(),
                            size_t{0}) == batch->token_ids.size());
    for (int32_t id : batch->request_ids)
      if (std::find(outcome.admitted.begin(), outcome.admitted.end(), id) == outcome.admitted.end())
        outcome.admitted.push_back(id);
    for (int32_t id : scheduler.commit(Ids(batch->sampling.size(), 3)))
      outcome.finished.push_back(id);
    if (turn % 16 == 0) scheduler.validate();
  }
  return outcome;
}

}  // namespace

TEST_CASE("a queue without ranks is first in, first out; who comes back is first again") {
  RequestQueue queue(100);
  for (int32_t slot = 0; slot < 5; ++slot) queue.add(slot, "", 0);
  CHECK(take(queue) == 0);
  CHECK(take(queue) == 1);
  queue.push_front(1);
  queue.remove(2);
  CHECK(queue.size() == 3);
  CHECK(Ids(queue.next(9).begin(), queue.next(9).end()) == Ids{1, 3, 4});
  CHECK(take(queue) == 1);
  queue.remove(1);
  queue.add(1, "", 0);  // the slot of another request
  CHECK(take(queue) == 3);
  CHECK(take(queue) == 4);
  CHECK(take(queue) == 1);
  CHECK(queue.empty());
}

TEST_CASE("higher priorities come first, equal ones in order") {
  RequestQueue queue(100);
  const Ids priorities = {0, 2, 1, 2, -1};
  for (int32_t slot = 0; slot < 5; ++slot) queue.add(slot, "", priorities[slot]);
  Ids order;
  while (!queue.empty()) order.push_back(take(queue));
  CHECK(order == Ids{1, 3, 2, 0, 4});
}

TEST_CASE("tenants share by the tokens they were served; a pause saves nothing up") {
  RequestQueue queue(1000);
  for (int32_t slot = 0; slot < 40; ++slot) queue.add(slot, slot < 30 ? "many" : "few", 0);
  int32_t num_few = 0;
  for (int turn = 0; turn < 12; ++turn) {
    const int32_t slot = take(queue);
    queue.charge(slot, slot < 30 ? 100 : 200);  // a request of few costs twice as much
    num_few += slot >= 30;
  }
  CHECK(num_few == 4);
  queue.add(40, "late", 0);  // begins level with the least served, not at zero
  int32_t num_late = 0;
  for (int turn = 0; turn < 4; ++turn) {
    const int32_t slot = take(queue);
    queue.charge(slot, 100);
    num_late += queue.tenant(slot) == "late";
  }
  CHECK(num_late == 1);
}

TEST_CASE("who was overtaken often enough is due, whatever its rank") {
  RequestQueue queue(3);
  queue.add(0, "a", 0);
  Ids order;
  for (int32_t slot = 1; slot < 8; ++slot) {  // better ones keep coming
    queue.add(slot, "b", 9);
    order.push_back(take(queue));
  }
  CHECK(order == Ids{1, 2, 3, 0, 4, 5, 6});
}

TEST_CASE("the scheduler admits by priority and preempts the lowest") {
  const SchedulerConfig config{.max_tokens_per_step = 32, .max_seqs = 2, .watermark = 0};
  KVCacheManager manager(64, 4);
  Scheduler scheduler(manager, config);
  for (int32_t i = 0; i < 4; ++i) scheduler.add(range(100 * i, 6), 3, {}, {.priority = i % 2});
  CHECK(run(scheduler, config).finished == Ids{1, 3, 0, 2});

  KVCacheManager small(8, 4, false);
  Scheduler tight(small, {.max_tokens_per_step = 32, .max_seqs = 4, .watermark = 0});
  tight.add(range(0, 12), 15, {}, {.priority = 1});
  tight.add(range(100, 8), 12, {}, {.priority = 0});
  int64_t preempted = 0;
  while (tight.has_work()) {
    const ScheduledBatch* batch = tight.schedule();
    REQUIRE(batch);
    if (batch->num_preempted > 0) {
      preempted += batch->num_preempted;
      CHECK(batch->request_ids[0] == 0);
      CHECK(tight.explain().find("request 1: preempted, no block is left") != std::string::npos);
    }
    tight.commit(Ids(batch->sampling.size(), 5));
  }
  CHECK(preempted > 0);
}

TEST_CASE("of waiting equals the one with the longest cached prefix comes first") {
  const SchedulerConfig config{.max_seqs = 1, .prefix_window = 4, .max_overtakes = 8};
  KVCacheManager manager(64, 4);
  Scheduler scheduler(manager, config);
  scheduler.add(range(0, 20), 2);
  run(scheduler, config);  // leaves its prompt in the cache
  scheduler.add(range(500, 20), 2);
  Ids longer = range(0, 12);
  longer.push_back(99);
  scheduler.add(longer, 2);
  scheduler.add(range(0, 20), 2);
  CHECK(run(scheduler, config).finished == Ids{3, 2, 1});
}

TEST_CASE("explain tells who was admitted, chunked, and what the next one waits for") {
  KVCacheManager manager(10, 4);
  Scheduler scheduler(manager, {.max_tokens_per_step = 16, .watermark = 0.1});
  scheduler.add(range(0, 24), 2);
  scheduler.add(range(100, 20), 2);
  REQUIRE(scheduler.schedule());
  CHECK(
      scheduler.explain() ==
      "running 1 of at most 256, waiting 1; step of 1 rows, 16 of 16 tokens; blocks: 6 of 10 free "
      "or cached, watermark 1\n"
      "request 0: admitted, 0 tokens cached, 16 computed in this step\n"
      "request 0: chunked, 8 tokens left for later steps\n"
      "no more admitted: max_tokens_per_step is spent\n");
  scheduler.commit({});
  REQUIRE(scheduler.schedule());
  CHECK(scheduler.explain().find("request 1 comes next: needs 6 blocks, watermark included, beside "
                                 "2 promised to running requests") != std::string::npos);
}

TEST_CASE("random traffic: all finish, nobody is overtaken for ever, the same twice") {
  for (uint32_t seed = 0; seed < 30; ++seed) {
    std::mt19937 setting(seed);
    const SchedulerConfig config{.max_tokens_per_step = 1 + static_cast<int32_t>(setting() % 24),
                                 .max_seqs = 1 + static_cast<int32_t>(setting() % 6),
                                 .watermark = (setting() % 3) * 0.1,
                                 .prefix_window = 1 + static_cast<int32_t>(setting() % 4),
                                 .max_overtakes = static_cast<int32_t>(setting() % 6)};
    const bool prefix_caching = setting() % 2;
    Outcome outcomes[2];
    for (Outcome& outcome : outcomes) {
      std::mt19937 random(seed);
      KVCacheManager manager(24, 4, prefix_caching);
      Scheduler scheduler(manager, config);
      constexpr int32_t kCount = 30;
      for (int32_t i = 0; i < kCount; ++i) {
        Ids prompt = range(0, 1 + static_cast<int32_t>(random() % 40));
        if (random() % 2) prompt[0] = static_cast<int32_t>(random() % 50);
        const std::string tenant(1, static_cast<char>('a' + random() % 3));
        const int32_t priority = static_cast<int32_t>(random() % 3);
        scheduler.add(prompt, 1 + static_cast<int32_t>(random() % 12), {}, {priority, tenant});
      }
      outcome = run(scheduler, config);
      CHECK(outcome.finished.size() == kCount);
      // All were there from the start: i of them were before the i-th, max_overtakes more may be,
      // and those that were preempted meanwhile.
      const int64_t slack = config.max_overtakes + scheduler.num_preemptions();
      for (size_t place = 0; place < outcome.admitted.size(); ++place)
        CHECK(static_cast<int64_t>(place) <= outcome.admitted[place] + slack);
      CHECK(manager.allocator().num_used() == 0);
    }
    CHECK(outcomes[0].finished == outcomes[1].finished);
    CHECK(outcomes[0].explanations == outcomes[1].explanations);
  }
}

TEST_CASE("steps that go on as they are: early ends, arrivals and a pool that runs dry") {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    KVCacheManager manager(40, 4, seed % 2 == 0);
    Scheduler scheduler(manager, {.max_tokens_per_step = 64, .max_seqs = 6, .watermark = 0});
    std::map<int32_t, int32_t> left;
    int32_t next = 0;
    for (int turn = 0; turn < 400; ++turn) {
      if (random() % 12 == 0 && left.size() < 10) {
        left[next] = 5 + static_cast<int32_t>(random() % 40);
        CHECK(scheduler.add(range(1000 * next, 3 + random() % 9), left[next]) == next);
        ++next;
      }
      const ScheduledBatch* batch = scheduler.schedule();
      scheduler.validate();
      if (!batch) {
        CHECK(left.empty());
        continue;
      }
      Ids sampled, expected;
      for (int32_t row : batch->sampling) {
        const int32_t id = batch->request_ids[row];
        sampled.push_back(10'000 * id + left.at(id));
        // Behind a prompt, the token to compute is the one sampled last.
        if (batch->num_new_tokens[row] == 1 && batch->step->seq_lens()[row] > 12)
          CHECK(batch->token_ids[batch->step->cu_seqlens_q()[row]] == 10'000 * id + left[id] + 1);
        if (--left[id] == 0) expected.push_back(id);
      }
      int32_t ended = -1;
      if (random() % 30 == 0 && left.size() > expected.size()) {  // in the step
        for (const auto& [id, count] : left)
          if (count > 0) ended = id;
        scheduler.finish(ended);
        left.erase(ended);
      }
      const auto finished = scheduler.commit(sampled);
      CHECK(Ids(finished.begin(), finished.end()) == expected);
      for (int32_t id : expected) left.erase(id);
      scheduler.validate();
    }
  }
}

TEST_CASE("preemption: short requests are computed again, long ones swapped if that is cheaper") {
  quire::PreemptionCosts costs;
  costs.seconds_per_token = 1e-4;
  costs.seconds_per_token_pair = 1e-8;
  costs.bytes_per_block = 1 << 20;
  quire::PreemptionEstimate estimate = quire::estimate_preemption(1000, 0, 63, costs);
  CHECK(estimate.cheaper == quire::Preemption::kRecompute);  // no swapping
  CHECK(estimate.recompute_seconds == doctest::Approx(0.1 + 1e-8 * 500'500));
  costs.bytes_per_second = 1e10;
  costs.seconds_per_swap = 1e-3;
  estimate = quire::estimate_preemption(1000, 0, 63, costs);
  CHECK(estimate.cheaper == quire::Preemption::kSwap);
  CHECK(estimate.swap_seconds == doctest::Approx(2e-3 + 2 * 63 * double(1 << 20) / 1e10));
  // What stays cached need not be computed again.
  estimate = quire::estimate_preemption(1000, 992, 63, costs);
  CHECK(estimate.cheaper == quire::Preemption::kRecompute);
  CHECK(quire::estimate_preemption(16, 0, 1, costs).cheaper == quire::Preemption::kRecompute);
  CHECK(quire::estimate_preemption(0, 0, 0, costs).cheaper == quire::Preemption::kRecompute);
  CHECK_THROWS_AS(quire::estimate_preemption(5, 6, 1, costs), quire::InvalidArgument);
  CHECK_THROWS_AS(quire::estimate_preemption(5, 5, -1, costs), quire::InvalidArgument);
}

TEST_CASE("wrong arguments") {
  KVCacheManager manager(8, 4);
  CHECK_THROWS_AS(Scheduler(manager, {.prefix_window = 0}), quire::InvalidArgument);
  CHECK_THROWS_AS(Scheduler(manager, {.max_overtakes = -1}), quire::InvalidArgument);
  quire::PreemptionCosts costs;
  costs.seconds_per_swap = -1;
  CHECK_THROWS_AS(Scheduler(manager, {.preemption = costs}), quire::InvalidArgument);
}
