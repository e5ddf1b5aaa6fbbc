// SPDX-License-Identifier: Apache-2.0
// Timers of blocks beside a plain map and set of them.
#include "quire/block_timers.h"

#include <doctest/doctest.h>

#include <map>
#include <random>
#include <set>
#include <utility>

using quire::BlockTimers;

TEST_CASE("the first timer is that of the earliest deadline, of equal ones of the lowest block") {
  constexpr int32_t kNumBlocks = 37;
  std::mt19937 random(1);
  BlockTimers timers(kNumBlocks);
  std::map<int32_t, double> ttls;
  std::map<int32_t, int64_t> deadlines;           // of blocks with a timer
  std::set<std::pair<int64_t, int32_t>> ordered;  // these
  const auto stop = [&](int32_t block) {
    if (const auto at = deadlines.find(block); at != deadlines.end()) {
      ordered.erase({at->second, block});
      deadlines.erase(at);
    }
  };
  for (int i = 0; i < 20'000; ++i) {
    const int32_t block = static_cast<int32_t>(random() % kNumBlocks);
    switch (random() % 8) {
      case 0:
      case 1:
        stop(block);
        ttls[block] = random() % 3;
        timers.set_ttl(block, ttls[block]);
        CHECK(timers.deadline(block) == 0);
        break;
      case 2:
        stop(block);
        ttls.erase(block);
        timers.erase(block);
        break;
      case 3:
        stop(block);
        timers.stop(block);
        break;
      default:
        if (!ttls.contains(block)) break;
        stop(block);
        deadlines[block] = 1 + static_cast<int64_t>(random() % 50);
        ordered.insert({deadlines[block], block});
        timers.start(block, deadlines[block]);
    }
    REQUIRE(timers.contains(block) == ttls.contains(block));
    if (ttls.contains(block)) REQUIRE(timers.ttl(block) == ttls[block]);
    REQUIRE(timers.empty() == ttls.empty());
    REQUIRE(timers.first() == (ordered.empty() ? -1 : ordered.begin()->second));
    if (!ordered.empty()) REQUIRE(timers.deadline(timers.first()) == ordered.begin()->first);
    timers.validate();
  }
  while (timers.first() >= 0) {
    CHECK(timers.first() == ordered.begin()->second);
    ordered.erase(ordered.begin());
    timers.stop(timers.first());
  }
  CHECK(ordered.empty());
}
