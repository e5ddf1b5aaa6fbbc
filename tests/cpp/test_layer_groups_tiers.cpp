// SPDX-License-Identifier: Apache-2.0
// Layer groups with stores behind the pool, host memory and restarts: a toy engine whose KV of a
// token tells token and group, and whose state is a hash of all tokens before.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"

using namespace quire;
using Ids = std::vector<int32_t>;
using Kind = LayerGroup::Kind;

namespace {

constexpr LayerGroup kState{Kind::kState, 0};
constexpr LayerGroup window(int32_t size) { return {Kind::kSlidingWindow, size}; }
constexpr LayerGroup chunk(int32_t size) { return {Kind::kChunkedLocal, size}; }

Ids range(int32_t first, int32_t count) {
  Ids tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// A store of one tier that has what it is given.
struct Shelf final : KVStore {
  std::map<std::array<uint8_t, 32>, Ids> blocks;
  std::shared_ptr<KVTicket> put(const ChainKey&, std::span<const std::byte>, OnDone) override {
    return nullptr;
  }
  std::shared_ptr<KVTicket> get(const ChainKey&, std::span<std::byte>, OnDone) override {
    return nullptr;
  }
  bool contains(const ChainKey& key) const noexcept override { return blocks.contains(key.bytes); }
  bool erase(const ChainKey& key) override { return blocks.erase(key.bytes) > 0; }
  void drain() override {}
  size_t block_bytes() const override { return 4; }
  KVStoreStats stats() const override { return {}; }
};

struct Engine {
  KVCacheManager manager;
  int32_t size;
  Ids kv, host;  // a number a slot
  Shelf shelf;

  Engine(int32_t num_blocks, int32_t block_size, bool caching, int32_t num_host_blocks,
         std::vector<LayerGroup> groups)
      : manager(num_blocks, block_size, caching, 0,
                {.num_host_blocks = num_host_blocks, .groups = std::move(groups)}),
        size(block_size),
        kv(num_blocks * block_size, -1),
        host(num_host_blocks * block_size, -2) {
    if (caching) manager.attach_store(shelf);
  }

  bool is_state(int32_t group) const { return manager.group(group).kind == Kind::kState; }
  static int32_t value_of(int32_t token, int32_t group) { return token * 8 + group; }
  static int32_t state_of(const Ids& tokens, int64_t count, int32_t group) {
    uint32_t state = static_cast<uint32_t>(group);
    for (int64_t i = 0; i < count; ++i) state = state * 31 + static_cast<uint32_t>(tokens[i]);
    return static_cast<int32_t>(state);
  }
  Ids block(int32_t id) const { return {&kv[id * size], &kv[id * size] + size}; }
  void write(int32_t id, const Ids& values) { std::ranges::copy(values, &kv[id * size]); }

  void offload() {
    for (const KVTransfer& offer : manager.take_offloads())
      shelf.blocks[offer.key.bytes] = block(offer.block);
  }

  // How many blocks were asked for, or -1; `most` come.
  int32_t fetch(SequenceId seq, int32_t most = INT32_MAX) {
    const int64_t before = manager.num_computed_tokens(seq);
    const auto loads = manager.fetch(seq);
    manager.validate();
    if (!loads) return -1;
    offload();
    if (loads->empty()) return 0;
    const auto count = static_cast<int32_t>(loads->size());
    for (int32_t i = 0; i < std::min(count, most); ++i)
      write((*loads)[i].block, shelf.blocks.at((*loads)[i].key.bytes));
    manager.fetched(seq, std::min(count, most));
    manager.validate();
    CHECK(manager.num_computed_tokens(seq) >= before);
    if (most >= count) CHECK(manager.num_computed_tokens(seq) > before);
    return count;
  }

  bool compute(SequenceId seq, int32_t count) {
    if (!manager.step({&seq, 1}, {&count, 1})) return false;
    offload();
    const Ids tokens = manager.tokens(seq);
    const int64_t begin = manager.num_computed_tokens(seq);
    for (int32_t group = 0; group < manager.num_groups(); ++group) {
      const StepBatch& batch = manager.batch(group);
      for (size_t i = 0; i < batch.copies().size(); i += 2)
        write(batch.copies()[i + 1], block(batch.copies()[i]));
      for (size_t i = 0; i < batch.slot_mapping().size(); ++i)
        kv[batch.slot_mapping()[i]] = value_of(tokens[begin + static_cast<int64_t>(i)], group);
      if (!is_state(group) || count == 0) continue;
      int32_t& state = kv[batch.block_table()[0] * size];
      if (begin > 0) CHECK(state == state_of(tokens, begin, group));
      state = state_of(tokens, begin + count, group);
    }
    manager.commit({&seq, 1});
    return true;
  }

  bool compute(SequenceId seq) {
    return compute(
        seq, static_cast<int32_t>(manager.num_tokens(seq) - manager.num_computed_tokens(seq)));
  }

  bool swap_out(SequenceId seq) {
    const auto pairs = manager.swap_out(seq);
    if (pairs)
      for (const auto& [from, to] : *pairs) std::ranges::copy(block(from), &host[to * size]);
    return pairs.has_value();
  }

  bool swap_in(SequenceId seq) {
    const auto pairs = manager.swap_in(seq);
    if (!pairs) return false;
    offload();
    for (const auto& [from, to] : *pairs)
      write(to, {&host[from * size], &host[from * size] + size});
    return true;
  }

  // What the sequence would read next.
  bool reads_back(SequenceId seq) const {
    const Ids tokens = manager.tokens(seq);
    const int64_t computed = manager.num_computed_tokens(seq);
    for (int32_t group = 0; group < manager.num_groups(); ++group) {
      const Ids table = manager.block_table(seq, group);
      if (is_state(group)) {
        if (computed > 0 && kv[table[0] * size] != state_of(tokens, computed, group)) return false;
        continue;
      }
      for (int64_t i = 0; i < computed; ++i)
        if (table[i / size] >= 0 &&
            kv[table[i / size] * size + i % size] != value_of(tokens[i], group))
          return false;
    }
    return true;
  }

  SequenceId run(const Ids& tokens) {
    const SequenceId seq = manager.create(tokens);
    REQUIRE(compute(seq));
    return seq;
  }
  void run_and_free(const Ids& tokens) {
    const SequenceId seq = run(tokens);
    manager.free({&seq, 1});
  }
};

const std::vector<std::vector<LayerGroup>> kModels = {
    {{}, window(5)},           {{}, chunk(8)},     {{}, kState},
    {{}, window(1), chunk(6)}, {{}, LayerGroup{}}, {{}, window(7), kState, kState},
};

}  // namespace

TEST_CASE("a swapped sequence takes what each group needs, and comes back as it was") {
  Engine engine(40, 4, false, 40, {{}, window(6), chunk(8), kState});
  const SequenceId seq = engine.run(range(0, 22));
  const int32_t used = engine.manager.allocator().num_used();
  const auto pairs = engine.manager.swap_out(seq);
  REQUIRE(pairs);
  // 6 blocks of full attention, the 2 of the last 5 tokens, the 2 from token 16 on, and the state.
  CHECK(pairs->size() == 6 + 2 + 2 + 1);
  CHECK(engine.manager.allocator().num_used() == 0);
  CHECK(engine.manager.stats().swapped_blocks == 11);
  engine.manager.validate();
  for (const auto& [from, to] : *pairs)
    std::ranges::copy(engine.block(from), &engine.host[to * engine.size]);
  std::ranges::fill(engine.kv, -1);
  REQUIRE(engine.swap_in(seq));
  engine.manager.validate();
  CHECK(engine.manager.allocator().num_used() == used);
  CHECK(engine.manager.num_computed_tokens(seq) == 22);
  CHECK(engine.reads_back(seq));
}

TEST_CASE("between step and commit a sequence with a state can't be swapped out") {
  KVCacheManager manager(20, 4, true, 0, {.num_host_blocks = 20, .groups = {{}, kState}});
  const SequenceId seq = manager.create(range(0, 6));
  REQUIRE(manager.step({&seq, 1}, Ids{6}));
  CHECK_THROWS_WITH_AS(manager.swap_out(seq),
                       doctest::Contains("swap_out: seq: expected one between commit() and step(),"
                                         " as groups[1] is a state, got one with 6"),
                       InvalidArgument);
  manager.commit({&seq, 1});
  CHECK(manager.swap_out(seq).has_value());
  manager.validate();
}

TEST_CASE("on the way back companions that are still cached need no copy") {
  Engine engine(40, 4, true, 40, {{}, window(6), kState});
  const SequenceId seq = engine.run(range(0, 24));
  REQUIRE(engine.swap_out(seq));
  const auto pairs = engine.manager.swap_in(seq);
  REQUIRE(pairs);
  CHECK(pairs->empty());
  engine.manager.validate();
  CHECK(engine.reads_back(seq));
}

TEST_CASE("what was evicted in any group comes back from a store") {
  for (const auto& groups : kModels) {
    Engine engine(30, 4, true, 0, groups);
    const Ids prompt = range(0, 25);
    const SequenceId first = engine.manager.create(prompt);
    REQUIRE(engine.compute(first, 24));  // so that a state is kept
    REQUIRE(engine.compute(first));
    engine.manager.free({&first, 1});
    for (int32_t i = 1; engine.manager.match(prompt).num_tokens > 0; ++i) {
      REQUIRE(i < 20);
      engine.run_and_free(range(1000 * i, 20));
    }
    const SequenceId seq = engine.manager.create(prompt);
    CHECK(engine.manager.num_computed_tokens(seq) == 0);
    CHECK(engine.fetch(seq) > 0);
    CHECK(engine.manager.num_computed_tokens(seq) == 24);
    CHECK(engine.manager.num_cached_tokens(seq) == 24);
    CHECK(engine.reads_back(seq));
    REQUIRE(engine.compute(seq));
    CHECK(engine.reads_back(seq));
  }
}

TEST_CASE("of a window that comes in part nothing is taken, and nothing is lost") {
  Engine engine(20, 4, true, 0, {{}, window(9)});
  const Ids prompt = range(0, 25);
  engine.run_and_free(prompt);
  engine.run_and_free(range(1000, 35));
  engine.run_and_free(range(2000, 35));
  const SequenceId seq = engine.manager.create(prompt);
  const int32_t used = engine.manager.allocator().num_used();
  REQUIRE(engine.fetch(seq, 6) > 6);
  CHECK(engine.manager.num_computed_tokens(seq) == 0);
  CHECK(engine.manager.allocator().num_used() == used);
  REQUIRE(engine.fetch(seq) > 6);
  CHECK(engine.manager.num_computed_tokens(seq) == 24);
  CHECK(engine.reads_back(seq));
}

TEST_CASE("forks, stores, swaps and restarts of every group in any order") {
  int64_t num_fetched = 0, num_swaps = 0, num_restarts = 0;
  for (uint32_t seed = 0; seed < 36; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto below = [&](size_t bound) { return static_cast<int32_t>(random() % bound); };
    const int32_t size = 1 + below(4);
    const auto& groups = kModels[seed % kModels.size()];
    Engine engine(10 * static_cast<int32_t>(groups.size()), size, seed % 5 > 0, 30, groups);
    std::vector<SequenceId> live;
    for (int turn = 0; turn < 400; ++turn) {
      const int32_t action = below(12);
      const size_t pick = live.empty() ? 0 : below(live.size());
      if (live.size() < 2 || (action < 3 && live.size() < 7)) {
        Ids tokens = range(100 * below(5), 1 + below(6 * size));
        if (below(3) == 0) tokens.back() = 7;
        live.push_back(engine.manager.create(tokens));
        const int32_t most = below(4) ? INT32_MAX : below(4);
        num_fetched += std::max(0, engine.fetch(live.back(), most));
      } else if (engine.manager.is_swapped_out(live[pick])) {
        if (action < 7)
          num_swaps += engine.swap_in(live[pick]);
        else if (action == 7)
          engine.manager.detach(live[pick]);
      } else if (action < 6) {
        const int64_t todo =
            engine.manager.num_tokens(live[pick]) - engine.manager.num_computed_tokens(live[pick]);
        engine.compute(live[pick], below(3) ? static_cast<int32_t>(todo) : below(todo + 1));
        if (below(2) == 0) num_fetched += std::max(0, engine.fetch(live[pick]));
      } else if (action == 6) {
        live.push_back(engine.manager.fork(live[pick]));
      } else if (action == 7) {
        engine.swap_out(live[pick]);
      } else if (action == 8) {
        engine.manager.truncate(live[pick], 1 + below(engine.manager.num_tokens(live[pick])));
      } else if (action == 9 && below(4) == 0) {
        engine.manager.clear_cache();
        engine.shelf.blocks.clear();
      } else if (action == 10) {
        // A manager that begins with the snapshot would do the same.
        const std::string saved = engine.manager.snapshot();
        KVCacheManager restored = KVCacheManager::restore(saved);
        restored.validate();
        REQUIRE((restored.snapshot() == saved));
        ++num_restarts;
      } else {
        engine.manager.free({&live[pick], 1});
        live.erase(live.begin() + static_cast<int64_t>(pick));
      }
      engine.manager.validate();
      for (SequenceId seq : live) REQUIRE(engine.reads_back(seq));
    }
    engine.manager.free(live);
    engine.manager.validate();
    CHECK(engine.manager.stats().used_blocks == 0);
    CHECK(engine.manager.stats().swapped_blocks == 0);
  }
  CHECK(num_fetched > 100);
  CHECK(num_swaps > 100);
  CHECK(num_restarts > 100);
}
