// SPDX-License-Identifier: Apache-2.0
// The ring of events: order, numbers without gaps but for the lost ones, and counts of those.
#include <doctest/doctest.h>

#include <random>

#include "quire/error.h"
#include "quire/event_log.h"

using namespace quire;

namespace {

CacheEvent event_of(int32_t block) {
  CacheEvent event;
  event.kind = block % 2 ? CacheEventKind::kEvicted : CacheEventKind::kStored;
  event.block = block;
  event.parent = root_key();
  event.key = chain_key(event.parent, std::span(&block, 1));
  return event;
}

}  // namespace

TEST_CASE("events come out as they went in, once") {
  EventLog log(4);
  for (int32_t block : {7, 8, 9}) log.push(event_of(block));
  CHECK(log.size() == 3);
  std::vector<CacheEvent> events;
  CHECK(log.take(events) == 0);
  REQUIRE(events.size() == 3);
  for (int32_t i = 0; i < 3; ++i) {
    const CacheEvent expected = event_of(7 + i);
    CHECK(events[i].sequence == i + 1);
    CHECK(events[i].kind == expected.kind);
    CHECK(events[i].block == expected.block);
    CHECK(events[i].key == expected.key);
    CHECK(events[i].parent == expected.parent);
  }
  CHECK(log.take(events) == 0);
  CHECK(events.size() == 3);
}

TEST_CASE("a full log loses the oldest and says how many") {
  EventLog log(3);
  for (int32_t block = 0; block < 8; ++block) log.push(event_of(block));
  std::vector<CacheEvent> events;
  CHECK(log.take(events) == 5);
  REQUIRE(events.size() == 3);
  CHECK(events[0].sequence == 6);
  CHECK(events[2].block == 7);
  log.push(event_of(8));
  CHECK(log.take(events) == 0);
  CHECK(events.back().sequence == 9);
  CHECK(log.num_lost() == 5);
}

TEST_CASE("nothing is lost unseen, however pushes and takes mix") {
  EventLog log(5);
  std::mt19937 random(3);
  int64_t next = 1, num_lost = 0;
  for (int n = 0; n < 300; ++n) {
    for (uint32_t i = random() % 9; i > 0; --i) log.push(event_of(static_cast<int32_t>(i)));
    CHECK(log.size() <= 5);
    std::vector<CacheEvent> events;
    const int64_t lost = log.take(events);
    CHECK(log.size() == 0);
    next += lost;
    num_lost += lost;
    for (const CacheEvent& event : events) CHECK(event.sequence == next++);
    CHECK(log.last_sequence() == next - 1);
  }
  CHECK(log.num_lost() == num_lost);
  CHECK(num_lost > 0);
}

TEST_CASE("a log needs room") {
  CHECK_THROWS_WITH_AS(EventLog(0), "EventLog: capacity: expected 1 or more, got 0",
                       InvalidArgument);
}
