// SPDX-License-Identifier: Apache-2.0
// Layer groups under a scheduler, and under random calls.
#include <doctest/doctest.h>

#include <numeric>
#include <random>
#include <vector>

#include "kv_traffic.h"
#include "quire/error.h"
#include "quire/kv_cache_manager.h"
#include "quire/scheduler.h"

namespace {

using quire::KVCacheManager;
using quire::LayerGroup;
using Kind = LayerGroup::Kind;

constexpr LayerGroup kFull{Kind::kFull, 0};
constexpr LayerGroup kState{Kind::kState, 0};
constexpr LayerGroup window(int32_t size) { return {Kind::kSlidingWindow, size}; }
constexpr LayerGroup chunk(int32_t size) { return {Kind::kChunkedLocal, size}; }

std::vector<int32_t> range(int32_t count, int32_t first = 0) {
  std::vector<int32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

}  // namespace

TEST_CASE("a window's cap lets a long prompt into the scheduler") {
  // 40 tokens: 10 blocks of full attention and, in steps of 8, at most 5 of the window's layers.
  KVCacheManager manager(15, 4, false, 0, {.groups = {kFull, window(8)}});
  quire::Scheduler scheduler(manager, {.max_tokens_per_step = 8, .watermark = 0});
  scheduler.add(range(38), 2);
  CHECK_THROWS_AS(scheduler.add(range(60), 2), quire::InvalidArgument);
  int32_t num_steps = 0;
  while (scheduler.has_work()) {
    const quire::ScheduledBatch* batch = scheduler.schedule();
    REQUIRE(batch);
    scheduler.commit(std::vector<int32_t>(batch->sampling.size(), 3));
    scheduler.validate();
    REQUIRE(++num_steps < 20);
  }
  CHECK(scheduler.num_preemptions() == 0);
  CHECK(manager.allocator().num_free() == 15);
}

TEST_CASE("the scheduler ends steps where a state can be kept") {
  KVCacheManager manager(64, 4, true, 0, {.groups = {kFull, window(6), kState}});
  quire::Scheduler scheduler(manager, {.max_tokens_per_step = 10, .max_seqs = 2});
  for (int32_t round = 0; round < 2; ++round) {
    scheduler.add(range(30), 3);
    std::vector<int32_t> counts;
    while (scheduler.has_work()) {
      const quire::ScheduledBatch* batch = scheduler.schedule();
      REQUIRE(batch);
      counts.push_back(batch->num_new_tokens[0]);
      scheduler.commit(std::vector<int32_t>(batch->sampling.size(), 3));
      scheduler.validate();
    }
    if (round == 0) CHECK(counts == std::vector<int32_t>{8, 8, 8, 4, 2, 1, 1});
    if (round == 1) CHECK(counts == std::vector<int32_t>{2, 1, 1});
  }
}

TEST_CASE("a scheduler under pressure finishes whatever the groups") {
  for (const auto& groups :
       {std::vector<LayerGroup>{kFull, window(6)}, std::vector<LayerGroup>{kFull, kState},
        std::vector<LayerGroup>{kFull, chunk(8), kState}}) {
    for (const bool caching : {true, false})
      for (int32_t depth = 0; depth < 2; ++depth) {
        KVCacheManager manager(26, 4, caching, depth, {.groups = groups});
        quire::Scheduler scheduler(manager, {.max_tokens_per_step = 16, .max_seqs = 8});
        for (int32_t i = 0; i < 12; ++i) scheduler.add(range(5 + i, i % 3), 12);
        int32_t num_steps = 0;
        while (scheduler.has_work()) {
          REQUIRE(++num_steps < 2000);
          const quire::ScheduledBatch* batch = scheduler.schedule();
          if (!batch) continue;
          scheduler.commit(std::vector<int32_t>(batch->sampling.size(), 3));
          if (depth > 0) manager.retire(manager.batch().ticket());
          scheduler.validate();
        }
        CHECK(manager.allocator().num_used() == 0);
      }
  }
}

TEST_CASE("random calls keep every invariant") {
  struct Source {
    std::mt19937 random;
    uint32_t next() { return random(); }
  };
  const std::vector<std::vector<LayerGroup>> models = {
      {kFull, window(5)},           {kFull, chunk(6)}, {kFull, kState},
      {kFull, window(1), chunk(8)}, {kFull, kFull},    {kFull, window(7), kState, kState}};
  for (uint32_t seed = 0; seed < 48; ++seed) {
    CAPTURE(seed);
    Source source{std::mt19937(seed)};
    const kv_traffic::Shape shape{.num_blocks = 20 + static_cast<int32_t>(source.next() % 60),
                                  .block_size = 1 + static_cast<int32_t>(source.next() % 5),
                                  .prefix_caching = source.next() % 4 > 0,
                                  .async_depth = static_cast<int32_t>(source.next() % 3),
                                  .max_seqs = 6,
                                  .max_tokens = 40};
    KVCacheManager manager(shape.num_blocks, shape.block_size, shape.prefix_caching,
                           shape.async_depth,
                           {.num_host_blocks = static_cast<int32_t>(source.next() % 20),
                            .groups = models[seed % models.size()]});
    kv_traffic::Traffic traffic(manager, manager, shape, source);
    for (int32_t i = 0; i < 400; ++i) {
      traffic.call();
      REQUIRE_NOTHROW(manager.validate());
    }
    traffic.free_all();
    manager.validate();
    CHECK(manager.stats().used_blocks == 0);
  }
}
