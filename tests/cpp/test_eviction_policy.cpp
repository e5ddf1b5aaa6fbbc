// SPDX-License-Identifier: Apache-2.0
// Both policies against plain models, and on a prefix tree: no victim has a cached child.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include "quire/error.h"
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

template <class Policy>
int class_of(const Policy& policy, int32_t block) {
  if constexpr (std::is_same_v<Policy, ReuseLruPolicy>) return policy.reuse_class(block);
  return 0;
}

template <class Policy, class Model>
void check_against(Model model, uint32_t seed) {
  constexpr int32_t kBlocks = 24;
  Policy policy(kBlocks);
  std::mt19937 random(seed);
  enum State { kEmpty, kUsed, kIdle };
  std::vector<State> states(kBlocks, kEmpty);
  uint64_t next_id = 0;
  for (int n = 0; n < 3000; ++n) {
    const int32_t block = static_cast<int32_t>(random() % kBlocks);
    if (states[block] == kEmpty) {
      policy.admit(block, id_of(next_id++), Policy::kNone);
      states[block] = kUsed;
    } else if (states[block] == kUsed) {
      policy.release(block);
      model.release(block, class_of(policy, block));
      states[block] = kIdle;
    } else if (random() % 4) {
      policy.use(block);
      model.drop(block);
      states[block] = kUsed;
    } else if (random() % 2) {
      policy.remove(block);
      model.drop(block);
      states[block] = kEmpty;
    } else {
      const int32_t victim = policy.victim();
      policy.evict(victim, id_of(next_id + 1000000));
      model.drop(victim);
      states[victim] = kEmpty;
    }
    REQUIRE(policy.victim() == model.victim());
  }
}

}  // namespace

TEST_CASE("LRU does as its model") {
  for (uint32_t seed = 0; seed < 5; ++seed) check_against<LruPolicy>(LruModel{}, seed);
}

TEST_CASE("reuse LRU does as its model") {
  for (uint32_t seed = 0; seed < 5; ++seed) check_against<ReuseLruPolicy>(ReuseModel{}, seed);
}

TEST_CASE("a use raises the class, up to the last") {
  ReuseLruPolicy policy(2);
  policy.admit(0, id_of(0), ReuseLruPolicy::kNone);
  for (int32_t expected : {0, 1, 2, 3, 3}) {
    CHECK(policy.reuse_class(0) == expected);
    policy.release(0);
    policy.use(0);
  }
}

TEST_CASE("contents that come back start a class higher, but never above their parent") {
  ReuseLruPolicy policy(100);
  constexpr int32_t kNone = ReuseLruPolicy::kNone;
  policy.admit(0, id_of(0), kNone);
  policy.release(0);
  policy.use(0);
  policy.release(0);
  policy.evict(0, id_of(0));
  policy.admit(5, id_of(0), kNone);
  CHECK(policy.reuse_class(5) == 2);
  policy.release(5);
  policy.evict(5, id_of(0));
  policy.admit(1, id_of(1), kNone);  // a new parent
  policy.admit(2, id_of(0), 1);
  CHECK(policy.reuse_class(2) == 0);
  policy.release(2);
  policy.remove(2);  // not remembered
  policy.admit(2, id_of(0), kNone);
  CHECK(policy.reuse_class(2) == 0);
}

TEST_CASE("most of the last blocks evicted are remembered, strangers hardly ever") {
  constexpr int32_t kBlocks = 10000;
  ReuseLruPolicy policy(kBlocks);
  constexpr int32_t kNone = ReuseLruPolicy::kNone;
  for (int32_t i = 0; i < kBlocks; ++i) {
    policy.admit(0, id_of(i), kNone);
    policy.release(0);
    policy.evict(0, id_of(i));
  }
  int known = 0, strangers = 0;
  for (int32_t i = 0; i < kBlocks; ++i) {
    policy.admit(0, id_of(i + 1000000), kNone);
    strangers += policy.reuse_class(0) > 0;
    policy.admit(0, id_of(i), kNone);
    known += policy.reuse_class(0) > 0;
  }
  CHECK(known > kBlocks * 6 / 10);  // as many more would leave exp(-1/2) of them
  CHECK(strangers <= 10);
}

TEST_CASE_TEMPLATE("a victim has no cached child", Policy, LruPolicy, ReuseLruPolicy) {
  constexpr int32_t kBlocks = 64;
  Policy policy(kBlocks);
  std::mt19937 random(11);
  std::map<std::vector<int>, int32_t> cached;  // path from the root -> block
  std::vector<int32_t> empty;
  for (int32_t block = 0; block < kBlocks; ++block) empty.push_back(block);
  const auto id = [](const std::vector<int>& path) {
    uint64_t id = 0;
    for (int step : path) id = id_of(id + static_cast<uint64_t>(step));
    return id;
  };
  int evictions = 0;
  for (int n = 0; n < 4000; ++n) {
    std::vector<int> path;
    std::vector<int32_t> blocks;
    for (size_t depth = 1 + random() % 12; path.size() < depth;) {
      path.push_back(static_cast<int>(random() % 3));
      if (const auto it = cached.find(path); it != cached.end()) {
        policy.use(it->second);
        blocks.push_back(it->second);
        continue;
      }
      if (empty.empty()) {
        const int32_t victim = policy.victim();
        REQUIRE(victim != Policy::kNone);
        const auto entry = std::find_if(cached.begin(), cached.end(),
                                        [&](const auto& e) { return e.second == victim; });
        const auto next = std::next(entry);  // its first descendant, if it has one, follows it
        const bool has_child =
            next != cached.end() && next->first.size() > entry->first.size() &&
            std::equal(entry->first.begin(), entry->first.end(), next->first.begin());
        REQUIRE_FALSE(has_child);
        policy.evict(victim, id(entry->first));
        cached.erase(entry);
        empty.push_back(victim);
        ++evictions;
      }
      const int32_t block = empty.back();
      empty.pop_back();
      policy.admit(block, id(path), blocks.empty() ? Policy::kNone : blocks.back());
      cached[path] = block;
      blocks.push_back(block);
    }
    for (auto it = blocks.rbegin(); it != blocks.rend(); ++it) policy.release(*it);
  }
  CHECK(evictions > 1000);
}

TEST_CASE("a policy needs blocks") {
  CHECK_THROWS_WITH_AS(LruPolicy(0), "EvictionPolicy: num_blocks: expected 1 or more, got 0",
                       InvalidArgument);
}
