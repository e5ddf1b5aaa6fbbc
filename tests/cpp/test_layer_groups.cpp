// SPDX-License-Identifier: Apache-2.0
#include "quire/layer_groups.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include <doctest/doctest.h>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

namespace {

using quire::KVCacheManager;
using quire::LayerGroup;
using quire::SequenceId;
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

// Computes `count` known tokens of a sequence and appends one where it then has none left.
bool run(KVCacheManager& manager, SequenceId seq, int32_t count) {
  if (!manager.step({&seq, 1}, {&count, 1})) return false;
  const int32_t sampled = 7;
  const bool samples = manager.num_computed_tokens(seq) + count == manager.num_tokens(seq);
  manager.commit({&seq, 1}, {&sampled, samples});
  manager.validate();
  return true;
}

void decode(KVCacheManager& manager, SequenceId seq, int32_t count) {
  for (int32_t i = 0; i < count; ++i) REQUIRE(run(manager, seq, 1));
}

// A sequence of these tokens, all computed, in steps of at most `step`.
SequenceId prefill(KVCacheManager& manager, const std::vector<int32_t>& tokens, int32_t step) {
  const SequenceId seq = manager.create(tokens);
  while (manager.num_computed_tokens(seq) < static_cast<int64_t>(tokens.size())) {
    const int64_t left = static_cast<int64_t>(tokens.size()) - manager.num_computed_tokens(seq);
    REQUIRE(run(manager, seq, static_cast<int32_t>(std::min<int64_t>(left, step))));
  }
  return seq;
}

int64_t num_held(const KVCacheManager& manager, SequenceId seq, int32_t group) {
  const std::vector<int32_t> table = manager.block_table(seq, group);
  return std::count_if(table.begin(), table.end(), [](int32_t block) { return block >= 0; });
}

// Gives the pool to a sequence that shares nothing, so that all idle blocks are evicted.
void evict_all(KVCacheManager& manager) {
  const int32_t available = manager.allocator().num_available();
  std::vector<int32_t> tokens = range(manager.allocator().block_size(), 1'000'000);
  std::vector<SequenceId> hogs;
  while (manager.allocator().num_available() > 0) {
    tokens[0] += 1;
    hogs.push_back(manager.create(tokens));
    const int32_t count = static_cast<int32_t>(tokens.size());
    if (!manager.step({&hogs.back(), 1}, {&count, 1})) break;
  }
  manager.free(hogs);
  REQUIRE(manager.allocator().num_available() == available);
}

}  // namespace

TEST_CASE("one group is what there was") {
  KVCacheManager plain(8, 4), one(8, 4, true, 0, {.groups = {kFull}});
  CHECK(plain.num_groups() == 1);
  CHECK(one.num_groups() == 1);
  CHECK(one.num_bytes() == plain.num_bytes());
}

TEST_CASE("wrong groups are refused by name") {
  const auto make = [](std::vector<LayerGroup> groups) {
    KVCacheManager manager(8, 4, true, 0, {.groups = std::move(groups)});
  };
  CHECK_THROWS_WITH_AS(make({window(8)}), doctest::Contains("groups[0]: expected full attention"),
                       quire::InvalidArgument);
  CHECK_THROWS_WITH_AS(make({kFull, window(0)}),
                       "KVCacheManager: groups[1]: window: expected 1 token or more, got 0",
                       quire::InvalidArgument);
  CHECK_THROWS_WITH_AS(make({kFull, chunk(-1)}), doctest::Contains("chunk: expected 1 token"),
                       quire::InvalidArgument);
  CHECK_THROWS_AS(make({kFull, {Kind::kState, 3}}), quire::InvalidArgument);
  KVCacheManager manager(8, 4, true, 0, {.groups = {kFull, window(8)}});
  const SequenceId seq = manager.create(range(3));
  CHECK_THROWS_WITH_AS(manager.block_table(seq, 2), doctest::Contains("group: expected 0 to 1"),
                       quire::InvalidArgument);
}

TEST_CASE("blocks behind a window are given back as it moves") {
  KVCacheManager manager(64, 4, false, 0, {.groups = {kFull, window(6)}});
  const SequenceId seq = prefill(manager, range(10), 10);
  // The next token is at 10 and reads 5 ... 10: blocks 1 and 2.
  CHECK(manager.block_table(seq, 1)[0] == -1);
  CHECK(num_held(manager, seq, 1) == 2);
  CHECK(num_held(manager, seq, 0) == 3);
  CHECK(manager.stats().used_blocks == 5);
  for (int32_t i = 0; i < 40; ++i) {
    decode(manager, seq, 1);
    const int64_t computed = manager.num_computed_tokens(seq);
    const auto table = manager.block_table(seq, 1);
    for (int64_t b = 0; b < static_cast<int64_t>(table.size()); ++b)
      CHECK((table[b] >= 0) == ((b + 1) * 4 > computed - 5));
  }
  CHECK(num_held(manager, seq, 1) <= 3);
  const auto stats = manager.group_stats();
  CHECK(stats[0].used_blocks == 13);
  CHECK(stats[1].used_blocks == num_held(manager, seq, 1));
  manager.free({&seq, 1});
  CHECK(manager.allocator().num_free() == 64);
}

TEST_CASE("a step's rows are the tables, group by group") {
  KVCacheManager manager(64, 4, true, 0, {.groups = {kFull, window(6), kState}});
  const SequenceId seq = prefill(manager, range(10), 10);
  const int32_t one = 1;
  REQUIRE(manager.step({&seq, 1}, {&one, 1}));
  for (int32_t group = 0; group < 2; ++group) {
    const quire::StepBatch& batch = manager.batch(group);
    const auto table = manager.block_table(seq, group);
    CHECK(std::equal(table.begin(), table.end(), batch.block_table().data()));
    REQUIRE(batch.slot_mapping().size() == 1);
    CHECK(batch.slot_mapping()[0] == table[2] * 4 + 2);
    CHECK(batch.seq_lens()[0] == 11);
    CHECK(batch.ticket() == manager.batch().ticket());
  }
  CHECK(manager.batch(2).max_blocks() == 1);
  CHECK(manager.batch(2).slot_mapping().size() == 0);
  CHECK(manager.batch(2).block_table()[0] == manager.block_table(seq, 2)[0]);
}

TEST_CASE("blocks of a chunk that has ended are given back") {
  KVCacheManager manager(64, 4, false, 0, {.groups = {kFull, chunk(8)}});
  const SequenceId seq = prefill(manager, range(7), 7);
  CHECK(num_held(manager, seq, 1) == 2);
  decode(manager, seq, 1);  // the next token, at 8, begins a chunk
  CHECK(num_held(manager, seq, 1) == 0);
  decode(manager, seq, 1);
  CHECK(manager.block_table(seq, 1)[2] >= 0);
  CHECK(num_held(manager, seq, 1) == 1);
}

TEST_CASE("of a window only the tail need be cached") {
  KVCacheManager manager(64, 4, true, 0, {.groups = {kFull, window(6)}});
  const SequenceId first = prefill(manager, range(32), 8);
  manager.free({&first, 1});
  // Blocks that left the window are idle companions; take all of those but the last ones.
  const int32_t idle = manager.group_stats()[1].cached_blocks;
  CHECK(idle == 8);
  CHECK(manager.match(range(33)).num_tokens == 32);
  const SequenceId second = manager.create(range(33));
  CHECK(manager.num_cached_tokens(second) == 32);
  CHECK(num_held(manager, second, 1) == 2);  // tokens 27 ... 31
  manager.validate();
  evict_all(manager);  // leaves what the second holds
  manager.validate();
  CHECK(manager.group_stats()[1].cached_blocks == 0);
  CHECK(manager.match(range(33)).num_tokens == 32);
  CHECK(manager.match(range(29)).num_tokens == 0);  // 28 tokens would need 23 ... 27: block 5
}

TEST_CASE("a hit whose tail was evicted falls back") {
  KVCacheManager manager(64, 4, true, 0, {.groups = {kFull, window(5)}});
  const SequenceId seq = prefill(manager, range(24), 24);
  const SequenceId shorter = manager.create(range(13));  // holds companions of tokens 8 ... 11
  CHECK(manager.num_cached_tokens(shorter) == 12);
  manager.free({&seq, 1});
  CHECK(manager.match(range(25)).num_tokens == 24);
  evict_all(manager);
  CHECK(manager.match(range(25)).num_tokens == 12);
  manager.validate();
}

TEST_CASE("a chunk's hit needs the blocks since the chunk began") {
  KVCacheManager manager(64, 4, true, 0, {.groups = {kFull, chunk(8)}});
  const SequenceId seq = prefill(manager, range(20), 20);
  CHECK(manager.match(range(20)).num_tokens == 16);
  CHECK(manager.match(range(20)).num_blocks == 4);  // 16 tokens: a chunk begins, nothing else
  CHECK(manager.match(range(15)).num_tokens == 12);
  CHECK(manager.match(range(15)).num_blocks == 3 + 1);  // and block 2 of the chunks' layers
  manager.free({&seq, 1});
}

TEST_CASE("a state is found where a step ended with a block") {
  KVCacheManager manager(64, 4, true, 0, {.groups = {kFull, kState}});
  const SequenceId seq = manager.create(range(14));
  REQUIRE(run(manager, seq, 8));
  REQUIRE(run(manager, seq, 6));
  CHECK(manager.match(range(14)).num_tokens == 8);
  const SequenceId other = manager.create(range(14));
  CHECK(manager.num_cached_tokens(other) == 8);
  // The state there is the cache's: the sequence goes on in a copy.
  const int32_t checkpoint = manager.block_table(other, 1)[0], four = 4;
  REQUIRE(manager.step({&other, 1}, {&four, 1}));
  const quire::StepBatch& batch = manager.batch(1);
  REQUIRE(batch.copies().size() == 2);
  CHECK(batch.copies()[0] == checkpoint);
  CHECK(batch.copies()[1] == manager.block_table(other, 1)[0]);
  CHECK(manager.batch(0).copies().size() == 0);
  manager.commit({&other, 1});
  manager.validate();
  CHECK(manager.match(range(14)).num_tokens == 12);
}

TEST_CASE("a state is not shared with a fork, and is refused between step and commit") {
  KVCacheManager manager(64, 4, true, 0, {.groups = {kFull, kState}});
  const SequenceId seq = prefill(manager, range(6), 6);
  const SequenceId child = manager.fork(seq);
  const int32_t one = 1, state = manager.block_table(seq, 1)[0];
  CHECK(manager.block_table(child, 1)[0] == state);
  REQUIRE(manager.step({&child, 1}, {&one, 1}));
  CHECK(manager.batch(1).copies()[0] == state);
  CHECK(manager.block_table(child, 1)[0] != state);
  CHECK(manager.block_table(seq, 1)[0] == state);
  CHECK_THROWS_WITH_AS(manager.fork(child), doctest::Contains("groups[1] is a state"),
                       quire::InvalidArgument);
  manager.commit({&child, 1});
  manager.validate();
}

TEST_CASE("truncate: what a group gave up comes from the cache, or is computed again") {
  for (const bool caching : {true, false}) {
    KVCacheManager manager(64, 4, caching, 0, {.groups = {kFull, window(5)}});
    const SequenceId seq = prefill(manager, range(24), 24);
    manager.truncate(seq, 24);  // takes the sampled token back: nothing is lacking
    CHECK(manager.num_computed_tokens(seq) == 24);
    manager.truncate(seq, 14);
    manager.validate();
    CHECK(manager.num_tokens(seq) == 14);
    CHECK(manager.tokens(seq) == range(14));
    CHECK(manager.num_computed_tokens(seq) == (caching ? 12 : 0));
    REQUIRE(run(manager, seq, static_cast<int32_t>(14 - manager.num_computed_tokens(seq))));
  }
}

TEST_CASE("rejected drafts cost nothing between step and commit") {
  KVCacheManager manager(64, 4, false, 0, {.groups = {kFull, window(5)}});
  const SequenceId seq = prefill(manager, range(11), 11);
  const int32_t drafts[] = {1, 2, 3}, three = 3, four = 4;
  REQUIRE(run(manager, seq, 1));
  manager.truncate(seq, 12);
  manager.commit({&seq, 1}, drafts, {&three, 1});
  REQUIRE(manager.step({&seq, 1}, {&three, 1}));
  manager.truncate(seq, 13);
  manager.commit({&seq, 1}, {&four, 1});
  CHECK(manager.num_computed_tokens(seq) == 13);
  manager.validate();
}

TEST_CASE("companions follow pins and priorities") {
  KVCacheManager manager(32, 4, true, 0, {.groups = {kFull, window(6), kState}});
  const SequenceId seq = prefill(manager, range(16), 8);
  CHECK(manager.pin(seq) == 16);
  manager.free({&seq, 1});
  evict_all(manager);
  manager.validate();
  CHECK(manager.match(range(17)).num_tokens == 16);
  CHECK(manager.unpin(range(16)) == 16);
  evict_all(manager);
  CHECK(manager.match(range(17)).num_tokens == 0);
  CHECK(manager.stats().pinned_blocks == 0);

  const SequenceId precious = manager.create(range(16), {}, {.priority = 50});
  REQUIRE(run(manager, precious, 16));
  manager.free({&precious, 1});
  for (int32_t i = 1; i < 6; ++i) {
    const SequenceId other = prefill(manager, range(16, 1000 * i), 16);
    manager.free({&other, 1});
  }
  CHECK(manager.match(range(17)).num_tokens == 16);
}

TEST_CASE("the predicted blocks are the allocated ones") {
  KVCacheManager manager(256, 4, true, 0, {.groups = {kFull, window(9), chunk(12), kState}});
  const SequenceId seq = manager.create(range(100));
  for (int32_t count : {10, 1, 30, 7, 16, 16, 20}) {
    const int64_t end = manager.num_computed_tokens(seq) + count;
    const int32_t predicted = manager.num_missing_blocks(seq, end);
    const int32_t used = manager.allocator().num_used();
    REQUIRE(manager.step({&seq, 1}, {&count, 1}));
    // A copied state stays the cache's and goes out of use: one block taken, one given back.
    const auto num_copies = static_cast<int32_t>(manager.batch(3).copies().size() / 2);
    CHECK(manager.allocator().num_used() - used == predicted - num_copies);
    int64_t held = 0;
    for (int32_t group = 0; group < 4; ++group) held += num_held(manager, seq, group);
    CHECK(held <= manager.num_blocks_for(end, 30));
    manager.commit({&seq, 1});
    manager.validate();
  }
}

TEST_CASE("blocks of every group wait for running steps") {
  KVCacheManager manager(32, 4, true, 2, {.groups = {kFull, window(5), kState}});
  const SequenceId seq = manager.create(range(24));
  const int32_t count = 16, rest = 8;
  const int64_t first = manager.step({&seq, 1}, {&count, 1})->ticket();
  const auto behind = manager.block_table(seq, 1)[0];
  manager.commit({&seq, 1});
  CHECK(manager.block_table(seq, 1)[0] == -1);
  CHECK(manager.allocator().refcount(behind) == 1);  // of the fence
  const int64_t second = manager.step({&seq, 1}, {&rest, 1})->ticket();
  manager.validate();
  manager.retire(first);
  CHECK(manager.allocator().refcount(behind) == 0);
  manager.commit({&seq, 1});
  manager.free({&seq, 1});
  manager.retire(second);
  manager.validate();
  CHECK(manager.allocator().num_used() == 0);
}

TEST_CASE("out of blocks changes nothing in any group") {
  KVCacheManager manager(9, 4, true, 0, {.groups = {kFull, window(5), kState}});
  const SequenceId seq = prefill(manager, range(12), 12);
  const auto tables = [&] {
    std::vector<std::vector<int32_t>> result;
    for (int32_t group = 0; group < 3; ++group) result.push_back(manager.block_table(seq, group));
    return result;
  };
  const SequenceId big = manager.create(range(16, 100));
  const auto before = tables();
  const int32_t count = 16;
  CHECK(manager.step({&big, 1}, {&count, 1}) == nullptr);
  CHECK(tables() == before);
  CHECK(manager.block_table(big, 1).empty());
  manager.validate();
}
