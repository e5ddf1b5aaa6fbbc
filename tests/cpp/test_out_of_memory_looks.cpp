// SPDX-License-Identifier: Apache-2.0
// Memory runs out where a manager is looked at, saved, restored or recorded.
#include <memory>
#include <random>
#include <sstream>
#include <vector>

#include "kv_traffic.h"
#include "out_of_memory.h"
#include "quire/call_log.h"

namespace {

using namespace out_of_memory;
using quire::KVCacheManager;
using quire::SequenceId;
using Kind = quire::LayerGroup::Kind;

struct Random {
  std::mt19937 engine;
  uint32_t next() { return engine(); }
};

constexpr kv_traffic::Shape kShape{.num_blocks = 40,
                                   .block_size = 4,
                                   .prefix_caching = true,
                                   .async_depth = 2,
                                   .max_seqs = 8,
                                   .max_tokens = 60,
                                   .short_ttl = 20};
const quire::KVCacheOptions kOptions{.eviction = quire::Eviction::kReuseLru,
                                     .event_capacity = 2000,
                                     .num_host_blocks = 30,
                                     .groups = {{}, {Kind::kSlidingWindow, 6}}};

void check_looks(KVCacheManager& manager, SequenceId seq) {
  const std::string before = state_of(manager);
  const auto look = [&](auto call) {
    return until_it_works(call, [&] {
      manager.validate();
      REQUIRE(state_of(manager) == before);
    });
  };
  const Ids tokens = look([&] { return manager.tokens(seq); });
  CHECK(tokens.size() == static_cast<size_t>(manager.num_tokens(seq)));
  look([&] { return manager.match(tokens); });
  look([&] { return manager.match(tokens, "a"); });
  look([&] { return manager.match(seq); });
  look([&] { return manager.pending_tokens(seq); });
  look([&] { return manager.shareable_tokens(seq, manager.sequences().back()); });
  look([&] { return manager.num_missing_blocks(seq, manager.num_tokens(seq) + 9); });
  look([&] { return manager.sequences(); });
  look([&] { return manager.cached_blocks(); });
  look([&] { return manager.block_table(seq, 1); });
  look([&] { return manager.group_stats(); });
  CHECK(look([&] { return manager.stats(); }).num_blocks == kShape.num_blocks);
  look([&] { manager.validate(); });
  CHECK(look([&] { return manager.snapshot(); }) == manager.snapshot());
}

}  // namespace

TEST_CASE("out of memory in the midst of a look") {
  KVCacheManager manager(kShape.num_blocks, kShape.block_size, true, kShape.async_depth, kOptions);
  Random random{std::mt19937(1)};
  kv_traffic::Traffic traffic(manager, manager, kShape, random);
  manager.set_time(0);
  num_failures = 0;
  for (int i = 0; i < 300; ++i) {
    traffic.call();
    if (i % 5 == 0 && !traffic.live().empty()) check_looks(manager, traffic.live().front());
  }
  CHECK(num_failures > 1000);
}

TEST_CASE("events are not lost where there is no memory to take them") {
  KVCacheManager manager(kShape.num_blocks, kShape.block_size, true, kShape.async_depth, kOptions);
  Random random{std::mt19937(2)};
  kv_traffic::Traffic traffic(manager, manager, kShape, random);
  num_failures = 0;
  int64_t num_events = 0;
  for (int i = 0; i < 3000; ++i) {
    traffic.call();
    for (const quire::CacheEvent& event :
         until_it_works([&] { return manager.take_events(); }, [&] { manager.validate(); }))
      REQUIRE(event.sequence == ++num_events);
  }
  CHECK(num_events > 100);
  CHECK(num_failures > 50);
  CHECK(manager.stats().lost_events == 0);
}

TEST_CASE("a manager that cannot be restored for want of memory can be later") {
  KVCacheManager manager(kShape.num_blocks, kShape.block_size, true, kShape.async_depth, kOptions);
  Random random{std::mt19937(3)};
  kv_traffic::Traffic traffic(manager, manager, kShape, random);
  manager.set_time(0);
  num_failures = 0;
  for (int i = 0; i < 120; ++i) {
    traffic.call();
    if (i % 20 != 19) continue;
    const std::string snapshot = manager.snapshot();
    const auto restored = until_it_works(
        [&] {
          return std::unique_ptr<KVCacheManager>(
              new KVCacheManager(KVCacheManager::restore(snapshot)));
        },
        [] {});
    restored->validate();
    CHECK(sequences_of(*restored) == sequences_of(manager));
    CHECK(kv_traffic::without_times(restored->snapshot()) == kv_traffic::without_times(snapshot));
  }
  CHECK(num_failures > 500);
}

namespace {

// Some calls of a recorder run out of memory, before they have done anything or while they are
// written.
struct Recorded {
  quire::CallRecorder& recorder;
  std::mt19937& random;

  template <class Call>
  auto attempt(Call call) {
    try {
      struct Disarm {
        ~Disarm() { allocations_left = -1; }
      } disarm;
      allocations_left = static_cast<int64_t>(random() % 40);
      return call();
    } catch (const std::bad_alloc&) {
      ++num_failures;
    }
    recorder.manager().validate();
    return call();
  }
  SequenceId create(const Ids& tokens, quire::Salt salt) {
    return attempt([&] { return recorder.create(tokens, salt); });
  }
  const quire::StepBatch* step(std::span<const SequenceId> seqs, std::span<const int32_t> counts) {
    return attempt([&] { return recorder.step(seqs, counts); });
  }
  void commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled,
              std::span<const int32_t> num_sampled) {
    attempt([&] { recorder.commit(seqs, sampled, num_sampled); });
  }
  SequenceId fork(SequenceId seq) {
    return attempt([&] { return recorder.fork(seq); });
  }
  void truncate(SequenceId seq, int64_t num_tokens) {
    attempt([&] { recorder.truncate(seq, num_tokens); });
  }
  void free(std::span<const SequenceId> seqs) {
    attempt([&] { recorder.free(seqs); });
  }
  void retire(int64_t ticket) {
    attempt([&] { recorder.retire(ticket); });
  }
  auto swap_out(SequenceId seq) {
    return attempt([&] { return recorder.swap_out(seq); });
  }
  auto swap_in(SequenceId seq) {
    return attempt([&] { return recorder.swap_in(seq); });
  }
};

}  // namespace

TEST_CASE("a log that ran out of memory ends before that call, and can be replayed") {
  num_failures = 0;
  int num_ended = 0, num_whole = 0;
  int64_t num_replayed = 0;
  for (uint32_t seed = 0; seed < 60; ++seed) {
    std::ostringstream log;
    quire::CallRecorder recorder(
        {kShape.num_blocks, kShape.block_size, true, kShape.async_depth, kOptions}, log);
    Random random{std::mt19937(seed)};
    Recorded with_little{recorder, random.engine};
    kv_traffic::Traffic traffic(with_little, recorder.manager(), kShape, random);
    for (int i = 0; i < 12; ++i) traffic.call();
    recorder.manager().validate();
    ++(log.bad() ? num_ended : num_whole);
    const std::string bytes = log.str();
    const quire::ReplayReport report = quire::replay(std::as_bytes(std::span(bytes)));
    CHECK_MESSAGE(!report.difference, *report.difference);
    num_replayed += report.num_calls;
  }
  CHECK(num_failures > 50);
  CHECK(num_ended > 10);
  CHECK(num_whole > 2);
  CHECK(num_replayed > 100);
}
