// SPDX-License-Identifier: Apache-2.0
// Memory runs out where blocks leave the pool and come back: stores, and a manager that has some.
#include <algorithm>
#include <memory>
#include <random>
#include <unordered_set>
#include <vector>

#include "kv_traffic.h"
#include "out_of_memory.h"
#include "store_case.h"

namespace {

using namespace out_of_memory;
using quire::KVCacheManager;
using quire::KVOutcome;
using quire::KVTransfer;
using quire::SequenceId;
using Kind = quire::LayerGroup::Kind;

// A store that holds what it is told to. It gets and gives nothing.
class KeyStore final : public quire::KVStore {
 public:
  explicit KeyStore(quire::CacheTier tier = quire::CacheTier::kHost) : tier_(tier) {}
  void add(const quire::ChainKey& key) { keys_.insert(key); }
  bool contains(const quire::ChainKey& key) const noexcept override { return keys_.contains(key); }
  quire::CacheTier tier() const override { return tier_; }
  std::shared_ptr<quire::KVTicket> put(const quire::ChainKey&, std::span<const std::byte>,
                                       OnDone) override {
    return nullptr;
  }
  std::shared_ptr<quire::KVTicket> get(const quire::ChainKey&, std::span<std::byte>,
                                       OnDone) override {
    return nullptr;
  }
  bool erase(const quire::ChainKey&) override { return false; }
  void drain() override {}
  size_t block_bytes() const override { return 0; }
  quire::KVStoreStats stats() const override { return {}; }

 private:
  quire::CacheTier tier_;
  std::unordered_set<quire::ChainKey, quire::ChainKeyHash> keys_;
};

struct Random {
  std::mt19937 engine;
  uint32_t next() { return engine(); }
};

// What can be told while a fetch is under way, when there are no snapshots.
std::string state_while_fetching(const KVCacheManager& manager) {
  const quire::KVCacheStats stats = manager.stats();
  std::ostringstream state;
  state << stats.free_blocks << ' ' << stats.used_blocks << ' ' << stats.cached_blocks << ' '
        << stats.deferred_refs << ' ' << stats.prefix_hit_tokens << ' ' << stats.host_hit_tokens
        << ' ' << stats.file_hit_tokens << '\n'
        << sequences_of(manager);
  return state.str();
}

// Fetches what the stores hold of a sequence; some of it comes. Returns how many blocks did.
int32_t fetch_some(KVCacheManager& manager, Short& with_little, SequenceId seq, Random& random) {
  const auto loads = with_little.attempt([&] { return manager.fetch(seq); });
  if (!loads || loads->empty()) return 0;
  const int32_t num_came = static_cast<int32_t>(random.next() % (loads->size() + 1));
  with_little.keep_offloads();
  const std::string before = state_while_fetching(manager);
  until_it_works([&] { manager.fetched(seq, num_came); },
                 [&] {
                   manager.validate();
                   REQUIRE(state_while_fetching(manager) == before);
                 });
  manager.validate();
  return num_came;
}

void check_stores(uint32_t seed, int32_t async_depth, const quire::KVCacheOptions& options) {
  const kv_traffic::Shape shape{.num_blocks = 20,
                                .block_size = 4,
                                .prefix_caching = true,
                                .async_depth = async_depth,
                                .max_seqs = 5,
                                .max_tokens = 60,
                                .short_ttl = 20};
  KVCacheManager manager(shape.num_blocks, shape.block_size, true, async_depth, options);
  KeyStore host, file(quire::CacheTier::kFile);
  until_it_works([&] { manager.attach_store(host); }, [&] { manager.validate(); });
  manager.attach_store(file);
  Short with_little(manager);
  Random random{std::mt19937(seed)};
  kv_traffic::Traffic traffic(with_little, manager, shape, random);
  num_failures = 0;
  int64_t num_offers = 0, num_fetched = 0;
  std::vector<Ids> prompts;  // that come again
  for (int64_t i = 0; i < 400; ++i) {
    manager.set_time(i * 1'000'000'000);
    traffic.call();
    with_little.keep_offloads();
    for (const KVTransfer& offer : with_little.offloads()) {
      (random.next() % 2 ? host : file).add(offer.key);
      ++num_offers;
    }
    with_little.offloads().clear();
    if (!traffic.live().empty() && i % 4 == 0)
      prompts.push_back(manager.tokens(traffic.live()[random.next() % traffic.live().size()]));
    if (prompts.empty()) continue;
    const Ids& prompt = prompts[random.next() % prompts.size()];
    const SequenceId seq = with_little.create(prompt);
    num_fetched += fetch_some(manager, with_little, seq, random);
    const Ids rest{
        static_cast<int32_t>(manager.num_tokens(seq) - manager.num_computed_tokens(seq))};
    if (manager.may_step() && with_little.step({&seq, 1}, rest))
      with_little.commit({&seq, 1}, {}, {});
    with_little.free({&seq, 1});
  }
  traffic.free_all();
  manager.validate();
  CHECK(manager.allocator().num_used() == 0);
  CHECK(num_offers > 20);
  CHECK(num_fetched > 10);
  CHECK(num_failures > 500);
}

}  // namespace

TEST_CASE("out of memory with stores") {
  check_stores(1, 0, {});
  check_stores(2, 2, {.event_capacity = 1000, .num_host_blocks = 20});
}

TEST_CASE("out of memory with stores and several layer groups") {
  check_stores(3, 0, {.groups = {{}, {Kind::kSlidingWindow, 6}}});
  check_stores(4, 0, {.event_capacity = 1000, .groups = {{}, {Kind::kState}}});
  check_stores(5, 2, {.num_host_blocks = 30, .groups = {{}, {Kind::kChunkedLocal, 8}}});
}

// For each n a manager of its own, as a look at the offers takes them.
TEST_CASE("a call that runs out of memory loses no offer of the call before") {
  int num_failed = 0;
  for (int kind = 0; kind < 3; ++kind) {
    bool works = false;
    for (int64_t n = 0; !works; ++n) {
      KVCacheManager manager(8, 4, true, 0, {.num_host_blocks = 8});
      KeyStore store;
      manager.attach_store(store);
      const auto run = [&](SequenceId seq) {
        const Ids count{static_cast<int32_t>(manager.num_tokens(seq))};
        REQUIRE(manager.step({&seq, 1}, count));
        manager.commit({&seq, 1});
      };
      const SequenceId first = manager.create(Ids(16, 1)), second = manager.create(Ids(16, 2));
      run(first);
      run(second);
      manager.free({&first, 1});
      const SequenceId other = manager.create(Ids(8, 3));
      run(other);  // evicts two blocks of the first
      if (kind == 1) manager.swap_out(second);
      const SequenceId next = manager.create(Ids(8, 4));
      const Ids count{4};
      store.add(quire::chain_key(quire::root_key(), Ids(4, 4)));
      try {
        struct Disarm {
          ~Disarm() { allocations_left = -1; }
        } disarm;
        allocations_left = n;
        if (kind == 0) manager.step({&next, 1}, count);
        if (kind == 1) manager.swap_in(second);
        if (kind == 2) manager.fetch(next);
        works = true;
      } catch (const std::bad_alloc&) {
        ++num_failed;
        allocations_left = -1;
        CHECK(manager.take_offloads().size() == 2);
        manager.validate();
      }
    }
  }
  CHECK(num_failed > 5);
}

TEST_CASE("to take offers takes no memory") {
  KVCacheManager manager(4, 4);
  KeyStore store;
  manager.attach_store(store);
  for (int32_t token : {1, 2}) {
    const SequenceId seq = manager.create(Ids(16, token));
    const Ids count{16};
    REQUIRE(manager.step({&seq, 1}, count));
    manager.commit({&seq, 1});
    manager.free({&seq, 1});
  }
  num_failures = 0;
  CHECK(until_it_works([&] { return manager.take_offloads(); }, [] {}).size() == 4);
  CHECK(num_failures == 0);
  CHECK(manager.take_offloads().empty());
}

// Everything that the calling thread does. What the stores' own threads do has memory.
static void check_store(quire::KVStore& store) {
  num_failures = 0;
  int num_done = 0;
  for (int32_t i = 0; i < 20; ++i) {
    const auto key = until_it_works([&] { return store_case::key_of(i); }, [] {});
    const auto payload = store_case::payload_of(i, store.block_bytes());
    const auto count = [&num_done, filler = std::string(100, '.')](KVOutcome outcome) {
      num_done += outcome == KVOutcome::kDone && !filler.empty();
    };
    const auto is_idle = [&] { REQUIRE(store.stats().num_pending == 0); };
    const auto put = until_it_works([&] { return store.put(key, payload, count); }, is_idle);
    REQUIRE(put);
    CHECK(put->wait() == KVOutcome::kDone);
    store.drain();
    CHECK(until_it_works([&] { return store.contains(key); }, is_idle));
    std::vector<std::byte> out(store.block_bytes());
    const auto get = until_it_works([&] { return store.get(key, out, count); }, is_idle);
    REQUIRE(get);
    CHECK(get->wait() == KVOutcome::kDone);
    CHECK(out == payload);
    store.drain();
    if (i % 3 == 0) {
      CHECK(
          until_it_works([&] { return store.erase(key); }, [&] { REQUIRE(store.contains(key)); }));
      CHECK_FALSE(store.contains(key));
    }
    CHECK(until_it_works([&] { return store.stats(); }, is_idle).capacity_blocks == 8);
  }
  CHECK(num_done == 40);
  CHECK(store.stats().failed == 0);
  CHECK(store.stats().num_blocks <= 8);
  CHECK(num_failures > 60);
}

TEST_CASE("out of memory in the calls of a host store") {
  const quire::HostStoreConfig config{.capacity_bytes = 8 * 64, .block_bytes = 64};
  check_store(*until_it_works([&] { return quire::make_host_store(config); }, [] {}));
}

TEST_CASE("out of memory in the calls of a file store") {
  const store_case::TemporaryFolder folder;
  const quire::FileStoreConfig config{.path = folder.path() + "/store",
                                      .capacity_bytes = 8 * 64,
                                      .block_bytes = 64,
                                      .identity = "a model, layout and more"};
  check_store(*until_it_works([&] { return quire::open_file_store(config); }, [] {}));
  const auto again = until_it_works([&] { return quire::open_file_store(config); }, [] {});
  CHECK(again->stats().num_blocks > 0);
}
