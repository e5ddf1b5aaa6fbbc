// SPDX-License-Identifier: Apache-2.0
// What follows the prefix cache: whoever replays the events knows which blocks are cached, and
// under either policy no block is evicted before its children.
#include <doctest/doctest.h>

#include <map>
#include <random>

#include "kv_traffic.h"
#include "quire/chain_key.h"

using namespace quire;
using Ids = std::vector<int32_t>;

namespace {

KVCacheOptions with_events(int32_t capacity, Eviction eviction = Eviction::kLru) {
  KVCacheOptions options;
  options.event_capacity = capacity;
  options.eviction = eviction;
  return options;
}

SequenceId run(KVCacheManager& manager, const Ids& tokens, Salt salt = {}) {
  const SequenceId seq = manager.create(tokens, salt);
  const Ids count{static_cast<int32_t>(manager.num_tokens(seq) - manager.num_computed_tokens(seq))};
  REQUIRE(manager.step({&seq, 1}, count));
  manager.commit({&seq, 1});
  return seq;
}

void run_and_free(KVCacheManager& manager, const Ids& tokens, Salt salt = {}) {
  const SequenceId seq = run(manager, tokens, salt);
  manager.free({&seq, 1});
}

// The cached blocks, as a router that reads the events knows them.
struct Mirror {
  std::map<int32_t, ChainKey> blocks;
  std::map<std::string, int> children;  // by the key of a block or root
  int64_t last = 0;

  void apply(const CacheEvent& event) {
    REQUIRE(event.sequence == ++last);
    REQUIRE(event.tier == CacheTier::kDevice);
    if (event.kind == CacheEventKind::kStored) {
      REQUIRE(blocks.emplace(event.block, event.key).second);
      ++children[to_hex(event.parent)];
    } else {
      REQUIRE(blocks.at(event.block) == event.key);
      REQUIRE(children[to_hex(event.key)] == 0);
      blocks.erase(event.block);
      --children[to_hex(event.parent)];
    }
  }
};

struct Random {
  std::mt19937 engine;
  uint32_t next() { return static_cast<uint32_t>(engine()); }
};

}  // namespace

TEST_CASE("events name blocks as chain_keys does") {
  KVCacheManager manager(8, 4, true, 0, with_events(100));
  const Ids tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  run_and_free(manager, tokens, "tenant");
  std::vector<ChainKey> keys(2);
  chain_keys(root_key("tenant"), tokens, 4, keys);
  const std::vector<CacheEvent> events = manager.take_events();
  REQUIRE(events.size() == 3);
  CHECK(events[0].key == keys[0]);
  CHECK(events[0].parent == root_key("tenant"));
  CHECK(events[1].key == keys[1]);
  CHECK(events[1].parent == keys[0]);
  CHECK(events[2].parent == keys[1]);  // the partial block
  CHECK(events[2].key == chain_key(keys[1], Ids{9, 10}));
  CHECK(manager.take_events().empty());
}

TEST_CASE("an eviction is told before the block's new contents") {
  KVCacheManager manager(2, 4, true, 0, with_events(100));
  run_and_free(manager, {1, 2, 3, 4, 5, 6, 7, 8});
  const std::vector<CacheEvent> before = manager.take_events();
  run_and_free(manager, {9, 10, 11, 12});
  const std::vector<CacheEvent> events = manager.take_events();
  REQUIRE(events.size() == 2);
  CHECK(events[0].kind == CacheEventKind::kEvicted);
  CHECK(events[0].key == before[1].key);  // the leaf
  CHECK(events[0].parent == before[0].key);
  CHECK(events[1].kind == CacheEventKind::kStored);
  CHECK(events[1].block == events[0].block);
}

TEST_CASE("without a capacity there are no events; beyond it the oldest are lost and counted") {
  KVCacheManager silent(8, 4);
  run_and_free(silent, {1, 2, 3, 4, 5});
  CHECK(silent.take_events().empty());
  CHECK(silent.num_bytes() < KVCacheManager(8, 4, true, 0, with_events(1)).num_bytes());
  KVCacheManager manager(8, 4, true, 0, with_events(2));
  run_and_free(manager, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12});
  const std::vector<CacheEvent> events = manager.take_events();
  REQUIRE(events.size() == 2);
  CHECK(events[0].sequence == 2);
  CHECK(manager.stats().lost_events == 1);
  CHECK_THROWS_WITH_AS(KVCacheManager(8, 4, true, 0, with_events(-1)),
                       "KVCacheManager: event_capacity: expected 0 or more, got -1",
                       InvalidArgument);
}

TEST_CASE("whoever replays the events knows what is cached") {
  for (uint32_t seed = 0; seed < 24; ++seed) {
    const kv_traffic::Shape shape{.num_blocks = 6 + static_cast<int32_t>(seed % 20),
                                  .block_size = 1 + static_cast<int32_t>(seed % 5),
                                  .prefix_caching = true,
                                  .async_depth = static_cast<int32_t>(seed % 3),
                                  .max_seqs = 6,
                                  .max_tokens = 40};
    const Eviction eviction = seed % 2 ? Eviction::kReuseLru : Eviction::kLru;
    KVCacheManager manager(shape.num_blocks, shape.block_size, true, shape.async_depth,
                           with_events(10'000, eviction));
    Random random{std::mt19937(seed)};
    kv_traffic::Traffic traffic(manager, manager, shape, random);
    Mirror mirror;
    for (int turn = 0; turn < 600; ++turn) {
      traffic.call();
      manager.validate();
      for (const CacheEvent& event : manager.take_events()) mirror.apply(event);
      const std::vector<int32_t> cached = manager.cached_blocks();
      REQUIRE(cached.size() == mirror.blocks.size());
      for (int32_t block : cached) REQUIRE(mirror.blocks.contains(block));
    }
    CHECK(manager.stats().evicted_blocks > 0);
  }
}

TEST_CASE("reuse LRU keeps a prefix that was hit longer than LRU does") {
  for (const Eviction eviction : {Eviction::kLru, Eviction::kReuseLru}) {
    KVCacheManager manager(8, 4, true, 0, with_events(0, eviction));
    const Ids popular = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int n = 0; n < 4; ++n) run_and_free(manager, popular);
    for (int32_t n = 0; n < 8; ++n) run_and_free(manager, {100 + n, 1, 2, 3});
    CHECK((manager.match(popular).num_tokens > 0) == (eviction == Eviction::kReuseLru));
    for (int32_t n = 0; n < 40; ++n) run_and_free(manager, {200 + n, 1, 2, 3});
    CHECK(manager.match(popular).num_tokens == 0);  // in the end it ages, too
    manager.validate();
  }
}
