// SPDX-License-Identifier: Apache-2.0
// Stores behind the pool and sequences in host memory, with a toy engine whose KV of a token is the
// token itself: whatever leaves and comes back must read as it did, and nothing leaks.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#include "quire/error.h"
#include "quire/kv_cache_manager.h"
#include "store_case.h"

using namespace quire;
using Ids = std::vector<int32_t>;

namespace {

Ids range(int32_t first, int32_t count) {
  Ids tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

KVCacheOptions options_of(int32_t num_host_blocks, int32_t event_capacity = 0) {
  KVCacheOptions options;
  options.num_host_blocks = num_host_blocks;
  options.event_capacity = event_capacity;
  return options;
}

struct Engine {
  KVCacheManager manager;
  int32_t size;
  Ids kv, host;  // a token each
  std::vector<KVStore*> stores;

  Engine(int32_t num_blocks, int32_t block_size, int32_t num_host_blocks = 0, bool caching = true,
         int32_t event_capacity = 0)
      : manager(num_blocks, block_size, caching, 0, options_of(num_host_blocks, event_capacity)),
        size(block_size),
        kv(num_blocks * block_size, -1),
        host(num_host_blocks * block_size, -2) {}

  void attach(KVStore& store) {
    manager.attach_store(store);
    stores.push_back(&store);
  }

  std::span<int32_t> block(int32_t id) { return std::span(kv).subspan(id * size, size); }
  std::span<int32_t> host_block(int32_t id) { return std::span(host).subspan(id * size, size); }

  void offload() {
    for (const KVTransfer& transfer : manager.take_offloads())
      for (KVStore* store : stores) {
        const auto ticket = store->put(transfer.key, std::as_bytes(block(transfer.block)));
        REQUIRE(ticket);
        REQUIRE(ticket->wait() == KVOutcome::kDone);
      }
  }

  // Whole blocks that came.
  int32_t fetch(SequenceId seq) {
    const auto loads = manager.fetch(seq);
    if (!loads) return -1;
    if (loads->empty()) return 0;
    // Got before anything is put, which may push it out; written when that is saved.
    Ids payloads(loads->size() * size);
    int32_t count = 0;
    for (const KVTransfer& load : *loads) {
      KVStore* store = *std::find_if(stores.begin(), stores.end(),
                                     [&](KVStore* s) { return s->tier() == load.tier; });
      const auto payload = std::span(payloads).subspan(count * size, size);
      const auto ticket = store->get(load.key, std::as_writable_bytes(payload));
      if (!ticket || ticket->wait() != KVOutcome::kDone) break;
      ++count;
    }
    offload();
    for (int32_t i = 0; i < count; ++i)
      std::ranges::copy_n(&payloads[i * size], size, block((*loads)[i].block).begin());
    manager.fetched(seq, count);
    manager.validate();
    return count;
  }

  bool compute(SequenceId seq) {
    const Ids count{
        static_cast<int32_t>(manager.num_tokens(seq) - manager.num_computed_tokens(seq))};
    const StepBatch* batch = manager.step({&seq, 1}, count);
    if (!batch) return false;
    offload();
    for (size_t i = 0; i < batch->copies().size(); i += 2)
      std::ranges::copy(block(batch->copies()[i]), block(batch->copies()[i + 1]).begin());
    const Ids tokens = manager.tokens(seq);
    for (size_t i = 0; i < batch->positions().size(); ++i)
      kv[batch->slot_mapping()[i]] = tokens[batch->positions()[i]];
    manager.commit({&seq, 1});
    manager.validate();
    return true;
  }

  bool swap_out(SequenceId seq) {
    const auto pairs = manager.swap_out(seq);
    manager.validate();
    if (!pairs) return false;
    for (const auto& [source, target] : *pairs)
      std::ranges::copy(block(source), host_block(target).begin());
    return true;
  }

  bool swap_in(SequenceId seq) {
    const auto pairs = manager.swap_in(seq);
    manager.validate();
    if (!pairs) return false;
    offload();
    for (const auto& [source, target] : *pairs)
      std::ranges::copy(host_block(source), block(target).begin());
    return true;
  }

  bool reads_back(SequenceId seq) {
    const Ids tokens = manager.tokens(seq), table = manager.block_table(seq);
    for (int64_t i = 0; i < manager.num_computed_tokens(seq); ++i)
      if (block(table[i / size])[i % size] != tokens[i]) return false;
    return true;
  }

  void run_and_free(const Ids& tokens) {
    const SequenceId seq = manager.create(tokens);
    REQUIRE(compute(seq));
    manager.free({&seq, 1});
  }
};

std::unique_ptr<KVStore> host_store(int64_t num_blocks, int32_t block_size) {
  return make_host_store(
      {.capacity_bytes = num_blocks * block_size * 4, .block_bytes = block_size * int64_t{4}});
}

}  // namespace

TEST_CASE("what was evicted comes back from a store") {
  const auto store = host_store(100, 4);
  Engine engine(8, 4, 0, true, 1000);
  engine.attach(*store);
  const Ids prompt = range(0, 26);
  engine.run_and_free(prompt);
  engine.run_and_free(range(1000, 32));  // takes every block
  CHECK(engine.manager.match(prompt).num_tokens == 0);
  CHECK(store->stats().num_blocks == 6);  // the whole blocks
  engine.manager.take_events();
  const SequenceId seq = engine.manager.create(prompt);
  CHECK(engine.fetch(seq) == 6);
  CHECK(engine.manager.num_computed_tokens(seq) == 24);
  CHECK(engine.manager.num_cached_tokens(seq) == 24);
  CHECK(engine.reads_back(seq));
  CHECK(engine.manager.stats().host_hit_tokens == 24);
  CHECK(engine.manager.stats().prefix_hit_tokens == 0);
  const auto events = engine.manager.take_events();
  const auto count = [&](CacheEventKind kind) {
    return std::count_if(events.begin(), events.end(), [=](auto& e) { return e.kind == kind; });
  };
  CHECK(count(CacheEventKind::kSwapped) == 6);
  CHECK(count(CacheEventKind::kStored) == 6);
  CHECK(engine.compute(seq));
  engine.manager.free({&seq, 1});
  CHECK(engine.manager.stats().used_blocks == 0);
}

TEST_CASE("a fetched block takes the place of one that began as it does") {
  const auto store = host_store(100, 4);
  Engine engine(8, 4);
  engine.attach(*store);
  const Ids prompt = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  engine.run_and_free(prompt);
  engine.run_and_free(range(1000, 32));
  engine.run_and_free({1, 2, 3, 7, 7});
  const SequenceId seq = engine.manager.create(prompt);
  CHECK(engine.manager.num_cached_tokens(seq) == 3);
  CHECK(engine.fetch(seq) == 2);
  CHECK(engine.manager.num_cached_tokens(seq) == 8);
  CHECK(engine.reads_back(seq));
  CHECK(engine.manager.stats().prefix_hit_tokens == 0);
}

TEST_CASE("a get that fails leaves the rest to be computed") {
  const auto store = host_store(100, 4);
  Engine engine(8, 4);
  engine.attach(*store);
  const Ids prompt = range(0, 30);
  engine.run_and_free(prompt);
  engine.run_and_free(range(1000, 32));
  const SequenceId seq = engine.manager.create(prompt);
  const auto loads = engine.manager.fetch(seq);
  REQUIRE(loads);
  REQUIRE(loads->size() == 7);
  const SequenceId one[] = {seq};
  const Ids count{1};
  CHECK_THROWS_AS(engine.manager.step(one, count), InvalidArgument);
  CHECK_THROWS_AS(engine.manager.free(one), InvalidArgument);
  CHECK_THROWS_AS(engine.manager.fork(seq), InvalidArgument);
  CHECK_THROWS_AS(engine.manager.truncate(seq, 1), InvalidArgument);
  CHECK_THROWS_AS(engine.manager.detach(seq), InvalidArgument);
  CHECK_THROWS_AS(engine.manager.snapshot(), InvalidArgument);
  CHECK_THROWS_WITH_AS(engine.manager.fetched(seq, 8),
                       "fetched: num_blocks: expected 0 to 7, got 8", InvalidArgument);
  engine.manager.validate();
  for (int i = 0; i < 2; ++i) {
    const KVTransfer& load = (*loads)[i];
    store->get(load.key, std::as_writable_bytes(engine.block(load.block)))->wait();
  }
  engine.manager.fetched(seq, 2);
  CHECK(engine.manager.num_computed_tokens(seq) == 8);
  CHECK(engine.compute(seq));
  CHECK(engine.reads_back(seq));
  CHECK_THROWS_AS(engine.manager.fetched(seq, 0), InvalidArgument);
}

TEST_CASE("a fetch without room changes nothing") {
  const auto store = host_store(100, 4);
  Engine engine(8, 4);
  engine.attach(*store);
  engine.run_and_free(range(0, 30));
  const SequenceId other = engine.manager.create(range(1000, 28));
  REQUIRE(engine.compute(other));
  const SequenceId seq = engine.manager.create(range(0, 30));
  CHECK(engine.manager.num_cached_tokens(seq) == 4);
  CHECK(engine.fetch(seq) == -1);
  CHECK(engine.manager.num_computed_tokens(seq) == 4);
  engine.manager.validate();
  engine.manager.free({&other, 1});
  CHECK(engine.fetch(seq) == 6);
  CHECK(engine.reads_back(seq));
}

namespace {

// A store that cannot say what it has: an error of its own implementation.
class LostStore final : public KVStore {
 public:
  bool contains(const ChainKey&) const noexcept override { return ask(); }
  std::shared_ptr<KVTicket> put(const ChainKey&, std::span<const std::byte>, OnDone) override {
    return nullptr;
  }
  std::shared_ptr<KVTicket> get(const ChainKey&, std::span<std::byte>, OnDone) override {
    return nullptr;
  }
  bool erase(const ChainKey&) override { return false; }
  void drain() override {}
  size_t block_bytes() const override { return 16; }
  KVStoreStats stats() const override { return {}; }

 private:
  [[noreturn]] static bool ask() { throw std::runtime_error("no connection"); }
};

}  // namespace

TEST_CASE("a store of the caller's that throws while blocks are evicted ends the process") {
  constexpr int kEnded = 7;
  static_assert(noexcept(std::declval<const KVStore&>().contains({})));
  const pid_t child = ::fork();
  if (child == 0) {
    std::set_terminate([] { ::_exit(kEnded); });
    LostStore store;
    Engine engine(8, 4);
    engine.attach(store);
    for (int32_t i = 0; i < 2; ++i) {
      const SequenceId seq = engine.manager.create(range(1000 * i, 32));
      engine.compute(seq);  // the second evicts what the first has left
      engine.manager.free({&seq, 1});
    }
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == kEnded);
}

TEST_CASE("the nearest store that has a block gives it") {
  const store_case::TemporaryFolder folder;
  const auto near = host_store(3, 4);
  const auto far =
      open_file_store({.path = folder.path(), .capacity_bytes = 1600, .block_bytes = 16});
  Engine engine(8, 4);
  engine.attach(*near);
  engine.attach(*far);
  CHECK_THROWS_AS(engine.manager.attach_store(*far), InvalidArgument);
  engine.run_and_free(range(0, 25));
  engine.run_and_free(range(1000, 32));
  const SequenceId seq = engine.manager.create(range(0, 25));
  // Leaves were evicted first, so that the near store of 3 still has the first blocks.
  CHECK(engine.fetch(seq) == 6);
  CHECK(engine.reads_back(seq));
  CHECK(engine.manager.stats().host_hit_tokens == 12);
  CHECK(engine.manager.stats().file_hit_tokens == 12);
}

TEST_CASE("a swapped sequence comes back as it was") {
  for (const bool caching : {false, true}) {
    Engine engine(8, 4, 4, caching);
    const SequenceId seq = engine.manager.create(range(0, 15));
    REQUIRE(engine.compute(seq));
    const SequenceId big = engine.manager.create(range(500, 20));
    REQUIRE_FALSE(engine.compute(big));
    CHECK(engine.swap_out(seq));
    CHECK(engine.manager.is_swapped_out(seq));
    CHECK(engine.manager.stats().used_blocks == 0);
    CHECK(engine.manager.stats().swapped_blocks == 4);
    CHECK(engine.swap_out(big));  // nothing is computed: it takes no host blocks
    CHECK(engine.swap_in(big));
    REQUIRE(engine.compute(big));
    CHECK_FALSE(engine.swap_in(seq));
    CHECK(engine.manager.is_swapped_out(seq));
    const Ids count{0};
    CHECK_THROWS_AS(engine.manager.step({&seq, 1}, count), InvalidArgument);
    CHECK_THROWS_AS(engine.manager.attach(seq), InvalidArgument);
    CHECK_THROWS_AS(engine.manager.fork(seq), InvalidArgument);
    CHECK_THROWS_AS(engine.manager.swap_out(seq), InvalidArgument);
    CHECK_THROWS_AS(engine.manager.swap_in(big), InvalidArgument);
    CHECK_FALSE(engine.swap_out(big));  // no room
    engine.run_and_free(range(900, 12));
    engine.manager.free({&big, 1});
    CHECK(engine.swap_in(seq));
    CHECK(engine.manager.num_computed_tokens(seq) == 15);
    CHECK(engine.reads_back(seq));
    CHECK(engine.manager.stats().swapped_blocks == 0);
    REQUIRE(engine.swap_out(seq));
    engine.manager.free({&seq, 1});  // gives its host blocks up
    engine.manager.validate();
    CHECK(engine.manager.stats().swapped_blocks == 0);
  }
}

TEST_CASE("what the prefix cache still has needs no copy on the way back") {
  Engine engine(16, 4, 8);
  const SequenceId seq = engine.manager.create(range(0, 15));
  REQUIRE(engine.compute(seq));
  REQUIRE(engine.swap_out(seq));
  const auto pairs = engine.manager.swap_in(seq);
  REQUIRE(pairs);
  CHECK(pairs->size() == 1);  // the partial block
  engine.manager.validate();
}

TEST_CASE("forks, stores and swaps in any order") {
  int64_t num_fetched = 0, num_swaps = 0;
  for (uint32_t seed = 0; seed < 12; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](size_t bound) { return static_cast<int32_t>(random() % bound); };
    const int32_t size = 1 + below(4);
    const auto store = host_store(20, size);
    Engine engine(12, size, 10, true);
    engine.attach(*store);
    std::vector<SequenceId> live;
    for (int turn = 0; turn < 800; ++turn) {
      const int32_t action = below(10);
      const size_t pick = live.empty() ? 0 : below(live.size());
      if (live.size() < 2 || (action < 3 && live.size() < 7)) {
        Ids tokens = range(100 * below(3), 1 + below(5 * size));
        if (below(3) == 0) tokens.back() = 7;
        live.push_back(engine.manager.create(tokens));
        num_fetched += std::max(0, engine.fetch(live.back()));
      } else if (engine.manager.is_swapped_out(live[pick])) {
        if (action < 6)
          num_swaps += engine.swap_in(live[pick]);
        else if (action == 6)
          engine.manager.detach(live[pick]);
      } else if (action < 6) {
        engine.compute(live[pick]);
      } else if (action == 6) {
        live.push_back(engine.manager.fork(live[pick]));
      } else if (action == 7) {
        engine.swap_out(live[pick]);
      } else if (action == 8) {
        engine.manager.truncate(live[pick], 1 + below(engine.manager.num_tokens(live[pick])));
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
  CHECK(num_fetched > 10);
  CHECK(num_swaps > 100);
}
