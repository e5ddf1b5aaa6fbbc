// SPDX-License-Identifier: Apache-2.0
// Both policies against plain models, as the pool's lists run them, and the memory of classes.
#include <doctest/doctest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include "quire/block_allocator.h"
#include "quire/eviction_policy.h"

using namespace quire;

namespace {

uint64_t id_of(uint64_t i) {  // a mix of all bits
  i = (i + 1) * 0x9e3779b97f4a7c15;
  i = (i ^ i >> 32) * 0xd6e8feb86659fd93;
  return i ^ i >> 29;
}

// A list in order of release.
struct LruModel {
  std::deque<int32_t> order;
  void release(int32_t block, int) { order.push_back(block); }
  void drop(int32_t block) { order.erase(std::find(order.begin(), order.end(), block)); }
  int32_t victim() const { return order.empty() ? -1 : order.front(); }
};

// Every block with its class and the time of its release; the victim by exact comparison of all.
struct ReuseModel {
  struct Entry {
    int64_t weight, time;
  };
  std::map<int32_t, Entry> entries;
  int64_t now = 0;
  void release(int32_t block, int reuse) { entries[block] = {reuse + 1, ++now}; }
  void drop(int32_t block) { entries.erase(block); }
  int32_t victim() const {
    const auto less = [&](const auto& a, const auto& b) {
      const auto &x = a.second, &y = b.second;
      const int64_t scaled_x = (now - x.time) * y.weight, scaled_y = (now - y.time) * x.weight;
      return scaled_x != scaled_y ? scaled_x < scaled_y : x.weight > y.weight;
    };
    const auto it = std::max_element(entries.begin(), entries.end(), less);
    return it == entries.end() ? -1 : it->first;
  }
};

// Blocks that are idle or in use, all of one level, in a pool of no free ones.
template <class Model>
void check_against(Eviction eviction, Model model, uint32_t seed) {
  constexpr int32_t kBlocks = 24;
  BlockAllocator pool(kBlocks, 16, eviction);
  std::mt19937 random(seed);
  std::vector<int32_t> all(kBlocks);
  REQUIRE(pool.allocate(all, [](int32_t victim) { return victim; }));
  uint64_t next_id = 0;
  const auto admit = [&](int32_t block) {
    pool.mark_cached(block);
    if (ReuseClasses* reuse = pool.reuse()) reuse->admit(block, id_of(next_id++), -1);
  };
  for (int32_t block : all) admit(block);
  for (int n = 0; n < 3000; ++n) {
    const int32_t block = static_cast<int32_t>(random() % kBlocks);
    if (pool.refcount(block) > 0) {
      pool.release(block);
      model.release(block, pool.reuse() ? pool.reuse()->reuse_class(block) : 0);
    } else if (random() % 4) {
      pool.share(block);
      if (ReuseClasses* reuse = pool.reuse()) reuse->use(block, -1);
      model.drop(block);
    } else {
      const int32_t expected = model.victim();
      int32_t taken;
      REQUIRE(pool.allocate({&taken, 1}, [](int32_t victim) { return victim; }));
      REQUIRE(taken == expected);
      model.drop(taken);
      admit(taken);
    }
    pool.validate();
  }
}

}  // namespace

TEST_CASE("LRU does as its model") {
  for (uint32_t seed = 0; seed < 5; ++seed) check_against(Eviction::kLru, LruModel{}, seed);
}

TEST_CASE("reuse LRU does as its model") {
  for (uint32_t seed = 0; seed < 5; ++seed) check_against(Eviction::kReuseLru, ReuseModel{}, seed);
}

TEST_CASE("a use raises the class, up to the last, and never above the parent's") {
  ReuseClasses classes(2);
  classes.admit(0, id_of(0), -1);
  classes.admit(1, id_of(1), 0);
  classes.use(1, 0);
  CHECK(classes.reuse_class(1) == 0);
  for (int32_t expected : {0, 1, 2, 3, 3}) {
    CHECK(classes.reuse_class(0) == expected);
    classes.use(0, -1);
  }
  classes.use(1, 0);
  CHECK(classes.reuse_class(1) == 1);
}

TEST_CASE("contents that come back start a class higher, but never above their parent") {
  ReuseClasses classes(100);
  classes.admit(0, id_of(0), -1);
  classes.use(0, -1);
  classes.evict(0);
  classes.admit(5, id_of(0), -1);
  CHECK(classes.reuse_class(5) == 2);
  classes.evict(5);
  classes.admit(1, id_of(1), -1);  // a new parent
  classes.admit(2, id_of(0), 1);
  CHECK(classes.reuse_class(2) == 0);
  classes.admit(2, id_of(0), -1);  // remembered once
  CHECK(classes.reuse_class(2) == 0);
}

TEST_CASE("most of the last blocks evicted are remembered, strangers hardly ever") {
  constexpr int32_t kBlocks = 10000;
  ReuseClasses classes(kBlocks);
  for (int32_t i = 0; i < kBlocks; ++i) {
    classes.admit(0, id_of(i), -1);
    classes.evict(0);
  }
  int known = 0, strangers = 0;
  for (int32_t i = 0; i < kBlocks; ++i) {
    classes.admit(0, id_of(i + 1000000), -1);
    strangers += classes.reuse_class(0) > 0;
    classes.admit(0, id_of(i), -1);
    known += classes.reuse_class(0) > 0;
  }
  CHECK(known > kBlocks * 6 / 10);  // as many more would leave exp(-1/2) of them
  CHECK(strangers <= 10);
}

TEST_CASE("contents have equal names where they and their parents are equal") {
  const std::vector<int32_t> tokens = {1, 2, 3}, others = {1, 3, 2};
  const uint64_t id = ReuseClasses::content_id(7, tokens);
  CHECK(ReuseClasses::content_id(7, tokens) == id);
  CHECK(ReuseClasses::content_id(8, tokens) != id);
  CHECK(ReuseClasses::content_id(7, others) != id);
  CHECK(ReuseClasses::content_id(7, std::span(tokens).first(2)) != id);
}

TEST_CASE("levels come before classes") {
  BlockAllocator pool(3, 16, Eviction::kReuseLru);
  const auto oldest = [](int32_t victim) { return victim; };
  std::vector<int32_t> blocks(3);
  REQUIRE(pool.allocate(blocks, oldest));
  for (int32_t block : blocks) {
    pool.mark_cached(block);
    pool.reuse()->admit(block, id_of(static_cast<uint64_t>(block)), -1);
  }
  pool.set_level(0, 5);  // of the lowest class, but worth more
  for (int n = 0; n < 3; ++n) pool.reuse()->use(1, -1);
  for (int32_t block : blocks) pool.release(block);
  std::vector<int32_t> order;
  for (int32_t taken; order.size() < 3; order.push_back(taken))
    REQUIRE(pool.allocate({&taken, 1}, oldest));
  CHECK(order == std::vector<int32_t>{1, 2, 0});  // 1 is the older of its level
}
