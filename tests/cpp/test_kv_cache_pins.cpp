// SPDX-License-Identifier: Apache-2.0
// Pins are taken back one by one, in any order, and only as they were made.
#include <doctest/doctest.h>

#include <map>
#include <numeric>
#include <random>
#include <string>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

using namespace quire;
using Ids = std::vector<int32_t>;

namespace {

constexpr int32_t kBlock = 4;
const LayerGroup kWindow{LayerGroup::Kind::kSlidingWindow, 6};  // tokens

Ids range(int32_t count) {
  Ids tokens(static_cast<size_t>(count));
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

void cache(KVCacheManager& manager, const Ids& tokens) {
  const SequenceId seq = manager.create(tokens);
  const Ids count{static_cast<int32_t>(manager.num_tokens(seq) - manager.num_computed_tokens(seq))};
  REQUIRE(manager.step({&seq, 1}, count));
  manager.commit({&seq, 1});
  manager.free({&seq, 1});
}

}  // namespace

TEST_CASE("a shorter prefix than was pinned is not pinned") {
  KVCacheManager manager(16, kBlock);
  cache(manager, range(16));
  CHECK(manager.pin(range(16)) == 16);
  CHECK(manager.unpin(range(8)) == 0);
  CHECK(manager.stats().pinned_blocks == 4);
  manager.validate();
  CHECK(manager.unpin(range(16)) == 16);
  CHECK(manager.unpin(range(16)) == 0);
  CHECK(manager.stats().pinned_blocks == 0);
  CHECK(manager.allocator().num_used() == 0);
  manager.validate();
}

TEST_CASE("prefixes of each other are pinned each on its own") {
  KVCacheManager manager(16, kBlock);
  cache(manager, range(16));
  CHECK(manager.pin(range(16)) == 16);
  CHECK(manager.pin(range(8)) == 8);
  KVCacheManager restored = KVCacheManager::restore(manager.snapshot());
  for (KVCacheManager* m : {&manager, &restored}) {
    CHECK(m->unpin(range(12)) == 8);  // as far as a pin reached that lies within
    CHECK(m->unpin(range(12)) == 0);
    CHECK(m->stats().pinned_blocks == 4);
    CHECK(m->unpin(range(20)) == 16);
    CHECK(m->stats().pinned_blocks == 0);
    m->validate();
  }
}

TEST_CASE("a pin that two continuations share is held by either") {
  KVCacheManager manager(16, kBlock);
  Ids other = range(12);
  other[10] = 77;
  cache(manager, range(12));
  cache(manager, other);
  CHECK(manager.pin(range(12)) == 12);
  CHECK(manager.pin(other) == 12);
  CHECK(manager.unpin(range(8)) == 0);
  CHECK(manager.unpin(range(12)) == 12);
  CHECK(manager.stats().pinned_blocks == 3);
  manager.validate();
  CHECK(manager.unpin(other) == 12);
  CHECK(manager.stats().pinned_blocks == 0);
}

TEST_CASE("a snapshot in which a block is pinned oftener than its prefix is refused") {
  KVCacheManager manager(4, kBlock);
  cache(manager, range(16));
  for (int n = 0; n < 7; ++n) CHECK(manager.pin(range(16)) == 16);
  const std::string saved = manager.snapshot();
  int num_counts = 0, num_refused = 0;
  size_t at = saved.find("\"pins\"");
  const size_t end = saved.find(']', at);
  for (at = saved.find('7', at); at < end; at = saved.find('7', at + 1)) {
    std::string broken = saved;
    broken[at] = '6';
    ++num_counts;
    try {
      KVCacheManager::restore(broken);
    } catch (const InvalidArgument&) {
      ++num_refused;
    }
  }
  CHECK(num_counts == 4);
  CHECK(num_refused == 3);  // the last block may be: one pin ended before it
}

TEST_CASE("in any order, with one group or two, the pins are those of a list") {
  for (const auto& groups : {std::vector<LayerGroup>{}, {LayerGroup{}, kWindow}})
    for (uint32_t seed = 0; seed < 20; ++seed) {
      std::mt19937 random(seed);
      KVCacheManager manager(64, kBlock, true, 0, {.groups = groups});
      // With a window a match ends where the window's blocks are: at each end that was cached.
      for (int32_t count = kBlock; count <= 8 * kBlock; count += kBlock)
        cache(manager, range(count));
      std::map<int64_t, int> pins;  // by length
      for (int n = 0; n < 200; ++n) {
        const int64_t length = static_cast<int64_t>(random() % (8 * kBlock + 1));
        const Ids tokens = range(static_cast<int32_t>(length));
        if (random() % 2) {
          const int64_t pinned = manager.pin(tokens);
          REQUIRE(pinned == length / kBlock * kBlock);
          if (pinned > 0) ++pins[pinned];
        } else {
          auto after = pins.upper_bound(length);
          const int64_t expected = after == pins.begin() ? 0 : std::prev(after)->first;
          REQUIRE(manager.unpin(tokens) == expected);
          if (expected > 0 && --pins[expected] == 0) pins.erase(expected);
        }
        manager.validate();
        REQUIRE((manager.stats().pinned_blocks == 0) == pins.empty());
      }
      while (manager.unpin(range(8 * kBlock)) > 0) {
      }
      CHECK(manager.allocator().num_used() == 0);
      manager.validate();
    }
}
