// SPDX-License-Identifier: Apache-2.0
// Memory runs out in the midst of a call: for every n the n-th allocation of it fails. Then the
// manager is as it was before, and the same call works once there is memory.
#include "out_of_memory.h"

#include <doctest/doctest.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "kv_traffic.h"

namespace out_of_memory {

thread_local int64_t allocations_left = -1;

}

namespace {

using out_of_memory::allocations_left;

void* allocate(size_t size, size_t alignment) {
  if (allocations_left >= 0 && allocations_left-- == 0) throw std::bad_alloc();
  void* memory = std::aligned_alloc(alignment, (size + alignment) / alignment * alignment);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t size) { return allocate(size, __STDCPP_DEFAULT_NEW_ALIGNMENT__); }
void* operator new(size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<size_t>(alignment));
}
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  try {
    return operator new(size);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

using namespace out_of_memory;
using quire::KVCacheManager;
using quire::SequenceId;

struct Random {
  std::mt19937 engine;
  uint32_t next() { return engine(); }
};

void check_traffic(uint32_t seed, bool caching, int32_t async_depth,
                   const quire::KVCacheOptions& options) {
  constexpr double kShortTtl = 20;  // seconds, one a call
  const kv_traffic::Shape shape{.num_blocks = 40,
                                .block_size = 4,
                                .prefix_caching = caching,
                                .async_depth = async_depth,
                                .max_seqs = 8,
                                .max_tokens = 60,
                                .short_ttl = kShortTtl};
  KVCacheManager manager(shape.num_blocks, shape.block_size, caching, async_depth, options);
  {  // entries for all sequences: a snapshot shows how many there are
    std::vector<SequenceId> seqs;
    for (int32_t i = 0; i < shape.max_seqs + 2; ++i) seqs.push_back(manager.create(Ids{i}));
    manager.free(seqs);
  }
  Short with_little{manager};
  Random random{std::mt19937(seed)};
  kv_traffic::Traffic traffic(with_little, manager, shape, random);
  num_failures = 0;
  for (int64_t i = 0; i < 400; ++i) {
    manager.set_time(i * 1'000'000'000);
    traffic.call();
  }
  traffic.free_all();
  manager.validate();
  CHECK(manager.allocator().num_used() == 0);
  CHECK(num_failures > 50);
}

using Kind = quire::LayerGroup::Kind;

}  // namespace

TEST_CASE("out of memory in any call: nothing has changed, and the call works later") {
  for (uint32_t seed = 1; seed <= 3; ++seed) check_traffic(seed, true, 0, {});
}

TEST_CASE("out of memory without prefix caching") {
  check_traffic(4, false, 0, {});
  check_traffic(5, false, 2, {.num_host_blocks = 20});
}

TEST_CASE("out of memory while events are made, classes of reuse, and with host blocks") {
  check_traffic(6, true, 0, {.event_capacity = 1000});
  check_traffic(7, true, 0, {.eviction = quire::Eviction::kReuseLru, .event_capacity = 1000});
  check_traffic(8, true, 0, {.event_capacity = 1000, .num_host_blocks = 30});
}

TEST_CASE("out of memory while steps run") {
  check_traffic(9, true, 1, {});
  check_traffic(10, true, 3, {.event_capacity = 1000, .num_host_blocks = 30});
}

TEST_CASE("out of memory with several layer groups") {
  check_traffic(11, true, 0, {.groups = {{}, {Kind::kSlidingWindow, 6}}});
  check_traffic(12, true, 0, {.groups = {{}, {Kind::kChunkedLocal, 8}}});
  check_traffic(13, true, 0, {.groups = {{}, {Kind::kState}}});
  check_traffic(14, true, 2,
                {.event_capacity = 1000,
                 .num_host_blocks = 30,
                 .groups = {{}, {Kind::kSlidingWindow, 9}, {Kind::kState}}});
  check_traffic(15, false, 0,
                {.groups = {{}, {Kind::kSlidingWindow, 5}, {Kind::kChunkedLocal, 8}}});
}

TEST_CASE("out of memory where a new sequence needs a new entry, and a salt a root") {
  KVCacheManager manager(64, 4);
  std::vector<SequenceId> seqs;
  num_failures = 0;
  for (int32_t i = 0; i < 40; ++i) {
    const std::string salt = "tenant " + std::to_string(i) + std::string(20, '.');
    seqs.push_back(until_it_works([&] { return manager.create(Ids{1, 2, i}, salt); },
                                  [&] {
                                    manager.validate();
                                    CHECK(manager.num_sequences() == i);
                                    CHECK(manager.stats().used_blocks == 0);
                                  }));
  }
  CHECK(num_failures > 100);
  manager.free(seqs);
  manager.validate();
  CHECK(manager.num_sequences() == 0);
}

TEST_CASE("out of memory where many children share a trunk") {
  KVCacheManager manager(64, 4);
  Ids prompt(50);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<int32_t>(i * i);
  const SequenceId seq = manager.create(prompt);
  const Ids all{50};
  manager.step({&seq, 1}, all);
  manager.commit({&seq, 1});
  std::vector<SequenceId> children(20);
  const auto is_as_before = [&] {
    manager.validate();
    CHECK(manager.num_sequences() == 1);
    CHECK(manager.tokens(seq) == prompt);
  };
  until_it_works([&] { manager.fork(seq, children); }, is_as_before);
  for (SequenceId child : children) CHECK(manager.block_table(child) == manager.block_table(seq));
  until_it_works([&] { manager.truncate(children[3], 10); },
                 [&] { CHECK(manager.tokens(children[3]) == prompt); });
  CHECK(manager.tokens(children[3]) == Ids(prompt.begin(), prompt.begin() + 10));
  until_it_works([&] { manager.free(children); }, [&] { CHECK(manager.num_sequences() == 21); });
  is_as_before();
}

// Two managers do the same, one of them short of memory. Rows decode on together (the loop): two of
// them the same tokens, so that one's blocks are swapped for the other's; now and then a token is
// too large to be packed.
static void check_loop(bool validates, bool has_wide) {
  const auto make = [] { return std::make_unique<KVCacheManager>(200, 4); };
  const std::unique_ptr<KVCacheManager> managers[] = {make(), make()};
  std::vector<SequenceId> seqs[2];
  Ids counts;
  for (int32_t i = 0; i < 6; ++i) {
    Ids prompt(3 + i % 5, i == 5 ? 0 : i);
    if (has_wide && i == 2) prompt.back() = 1 << 22;
    counts.push_back(static_cast<int32_t>(prompt.size()));
    for (int m : {0, 1}) seqs[m].push_back(managers[m]->create(prompt));
  }
  const auto check = [&] {
    if (validates) managers[1]->validate();
  };
  num_failures = 0;
  for (int32_t turn = 0; turn < 90; ++turn) {
    const quire::StepBatch* steps[2] = {managers[0]->step(seqs[0], counts)};
    steps[1] = until_it_works([&] { return managers[1]->step(seqs[1], counts); }, check);
    REQUIRE(std::equal(steps[0]->slot_mapping().begin(), steps[0]->slot_mapping().end(),
                       steps[1]->slot_mapping().begin()));
    for (size_t row = 0; row < seqs[0].size(); ++row)
      for (int32_t column = 0; column < (steps[0]->seq_lens()[row] + 3) / 4; ++column)
        REQUIRE_MESSAGE(steps[0]->block_table()[row * steps[0]->block_table_stride() + column] ==
                            steps[1]->block_table()[row * steps[1]->block_table_stride() + column],
                        "turn ", turn, " row ", row, " column ", column);
    Ids sampled{turn, 1, 2, 3, 4, turn};
    if (has_wide && turn % 7 == 3) sampled[turn % 6] = (1 << 21) + turn;
    managers[0]->commit(seqs[0], sampled);
    until_it_works([&] { managers[1]->commit(seqs[1], sampled); }, check);
    counts.assign(counts.size(), 1);
  }
  CHECK(num_failures > (validates ? 90 : 20));
  for (size_t row = 0; row < seqs[0].size(); ++row) {
    CHECK(managers[0]->tokens(seqs[0][row]) == managers[1]->tokens(seqs[1][row]));
    CHECK(managers[0]->block_table(seqs[0][row]) == managers[1]->block_table(seqs[1][row]));
  }
  for (int m : {0, 1}) {
    managers[m]->validate();
    managers[m]->free(seqs[m]);
    managers[m]->validate();
    CHECK(managers[m]->allocator().num_used() == 0);
  }
}

TEST_CASE("out of memory in the midst of steady decoding") {
  check_loop(false, false);
  check_loop(true, false);  // looking ends the steady run each time
}

TEST_CASE("out of memory with tokens that are kept in full") {
  check_loop(false, true);
  check_loop(true, true);
}

TEST_CASE("a look at what is cached may run out of memory") {
  KVCacheManager manager(64, 4);
  const SequenceId seq = manager.create(Ids(30, 7));
  const Ids all{30};
  manager.step({&seq, 1}, all);
  manager.commit({&seq, 1});
  const Ids asked(31, 7);
  const auto found =
      until_it_works([&] { return manager.match(asked); }, [&] { manager.validate(); });
  CHECK(found.num_tokens == 28);
}
