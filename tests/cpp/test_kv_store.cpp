// SPDX-License-Identifier: Apache-2.0
// What every store promises, checked on each of them: contents, recency, the bounded queue,
// callbacks that throw, use from several threads.
#include <doctest/doctest.h>

#include <atomic>
#include <future>
#include <map>
#include <optional>
#include <thread>

#include "kv_store/crc32c.h"
#include "quire/error.h"
#include "store_case.h"

using namespace quire;
using namespace store_case;

namespace {

struct Made {
  TemporaryFolder folder;
  std::unique_ptr<KVStore> store;
};

template <int kStore>
std::unique_ptr<Made> make(int64_t capacity, int64_t block_bytes = 100, int32_t max_pending = 64) {
  auto made = std::make_unique<Made>();
  if (kStore == 0)
    made->store = make_host_store({capacity * block_bytes, block_bytes, max_pending});
  else
    made->store = open_file_store(
        {made->folder.path(), capacity * block_bytes, block_bytes, "test", max_pending});
  return made;
}

// Occupies the store's threads until it goes.
class Blocked {
 public:
  Blocked(KVStore& store, bool has_thread_for_puts) : buffer_(store.block_bytes()) {
    const auto gate = gate_.get_future().share();
    std::promise<void> get_started, put_started;
    REQUIRE(store.get(key_of(-1), buffer_, [&get_started, gate](KVOutcome) {
      get_started.set_value();
      gate.wait();
    }));
    get_started.get_future().wait();
    if (!has_thread_for_puts) return;
    REQUIRE(store.put(key_of(-2), buffer_, [&put_started, gate](KVOutcome) {
      put_started.set_value();
      gate.wait();
    }));
    put_started.get_future().wait();
  }
  ~Blocked() { gate_.set_value(); }

 private:
  std::vector<std::byte> buffer_;
  std::promise<void> gate_;
};

}  // namespace

TEST_CASE_TEMPLATE_DEFINE("a store", Kind, store) {
  constexpr int kStore = Kind::value;

  SUBCASE("delivers what was put, until it is erased") {
    const auto made = make<kStore>(4);
    KVStore& store = *made->store;
    CHECK(get(store, 1) == KVOutcome::kMissing);
    CHECK_FALSE(store.contains(key_of(1)));
    CHECK(put(store, 1) == KVOutcome::kDone);
    CHECK(put(store, 2) == KVOutcome::kDone);
    CHECK(put(store, 1) == KVOutcome::kDone);
    CHECK(store.contains(key_of(1)));
    CHECK(get(store, 1) == KVOutcome::kDone);
    CHECK(get(store, 2) == KVOutcome::kDone);
    CHECK(store.erase(key_of(1)));
    CHECK_FALSE(store.erase(key_of(1)));
    CHECK(get(store, 1) == KVOutcome::kMissing);
    CHECK(put(store, 1) == KVOutcome::kDone);
    CHECK(get(store, 1) == KVOutcome::kDone);
    store.drain();
    const KVStoreStats stats = store.stats();
    CHECK(stats.num_blocks == 2);
    CHECK(stats.capacity_blocks == 4);
    CHECK(stats.stored == 3);
    CHECK(stats.hits == 3);
    CHECK(stats.misses == 2);
    CHECK(stats.num_pending == 0);
    CHECK(stats.failed + stats.dropped + stats.not_taken + stats.evicted == 0);
  }

  SUBCASE("gives up the least recently used, like a plain model") {
    constexpr int kCapacity = 5;
    const auto made = make<kStore>(kCapacity);
    std::map<int32_t, int> last_use;  // of what the store holds
    std::mt19937 random(7);
    for (int time = 0; time < 400; ++time) {
      const int32_t i = static_cast<int32_t>(random() % 12);
      const bool holds = last_use.contains(i);
      CHECK(made->store->contains(key_of(i)) == holds);
      switch (random() % 5) {
        case 0:
          CHECK(made->store->erase(key_of(i)) == holds);
          last_use.erase(i);
          break;
        case 1:
        case 2:
          CHECK(get(*made->store, i) == (holds ? KVOutcome::kDone : KVOutcome::kMissing));
          if (holds) last_use[i] = time;
          break;
        default:
          CHECK(put(*made->store, i) == KVOutcome::kDone);
          if (!holds && last_use.size() == kCapacity)
            last_use.erase(
                std::min_element(last_use.begin(), last_use.end(),
                                 [](const auto& a, const auto& b) { return a.second < b.second; }));
          last_use[i] = time;
      }
    }
    CHECK(made->store->stats().num_blocks == static_cast<int64_t>(last_use.size()));
  }

  SUBCASE("takes max_pending requests of each kind, and no more") {
    const auto made = make<kStore>(4, 100, 2);
    KVStore& store = *made->store;
    const auto payload = payload_of(0, 100);
    std::vector<std::byte> out(100);
    std::vector<std::shared_ptr<KVTicket>> tickets;
    std::optional<Blocked> blocked(std::in_place, store, kStore == 1);
    const int64_t num_running = store.stats().num_pending;
    for (int i = 0; i < 2; ++i) {
      tickets.push_back(store.put(key_of(i), payload));
      tickets.push_back(store.get(key_of(i), out));
    }
    CHECK(store.put(key_of(5), payload) == nullptr);
    CHECK(store.get(key_of(5), out) == nullptr);
    CHECK(store.stats().not_taken == 2);
    CHECK(store.stats().num_pending == num_running + 4);
    for (const auto& ticket : tickets) CHECK(ticket->outcome() == KVOutcome::kPending);
    blocked.reset();
    store.drain();
    CHECK(tickets[0]->outcome() == KVOutcome::kDone);
    CHECK(tickets[1]->outcome() != KVOutcome::kPending);
    if (kStore == 0) CHECK(tickets[1]->outcome() == KVOutcome::kMissing);  // gets come first
    CHECK(store.put(key_of(5), payload) != nullptr);
    store.drain();
  }

  SUBCASE("keeps one block of a key that is put twice at once") {
    const auto made = make<kStore>(4);
    const auto payload = payload_of(0, 100);
    {
      const Blocked blocked(*made->store, kStore == 1);
      for (int n = 0; n < 3; ++n)
        for (int32_t i = 0; i < 2; ++i) REQUIRE(made->store->put(key_of(i), payload));
    }
    made->store->drain();
    CHECK(made->store->stats().failed == 0);
    CHECK(made->store->stats().num_blocks == 2 + (kStore == 1));  // and the one of Blocked
    CHECK(made->store->stats().evicted == 0);
  }

  SUBCASE("survives callbacks that throw, and tells them the outcome") {
    const auto made = make<kStore>(4);
    KVStore& store = *made->store;
    const auto payload = payload_of(0, 100);
    std::vector<KVOutcome> seen;
    const auto on_done = [&](KVOutcome outcome) {
      seen.push_back(outcome);
      throw std::runtime_error("a bug of the caller");
    };
    std::vector<std::byte> out(100);
    CHECK(store.put(key_of(0), payload, on_done)->wait() == KVOutcome::kDone);
    CHECK(store.get(key_of(0), out, on_done)->wait() == KVOutcome::kDone);
    CHECK(store.get(key_of(1), out, on_done)->wait() == KVOutcome::kMissing);
    CHECK(seen == std::vector{KVOutcome::kDone, KVOutcome::kDone, KVOutcome::kMissing});
    CHECK(store.stats().callback_errors == 3);
    CHECK(get(store, 0) == KVOutcome::kDone);
  }

  SUBCASE("completes what it took before it goes") {
    std::vector<std::shared_ptr<KVTicket>> tickets;
    const auto payload = payload_of(0, 100);
    {
      const auto made = make<kStore>(4);
      for (int i = 0; i < 20; ++i) tickets.push_back(made->store->put(key_of(i), payload));
    }
    for (const auto& ticket : tickets) CHECK(ticket->outcome() == KVOutcome::kDone);
  }

  SUBCASE("delivers right bytes or none to several threads at once") {
    const auto made = make<kStore>(8, 4096);
    std::atomic<int> wrong{0}, right{0};
    const auto use = [&](uint32_t seed) {
      std::mt19937 random(seed);
      for (int n = 0; n < 150; ++n) {
        const int32_t i = static_cast<int32_t>(random() % 16);
        const uint32_t action = random() % 8;
        if (action == 0) made->store->erase(key_of(i));
        if (action == 1) made->store->contains(key_of(i));
        if (action < 4) put(*made->store, i);
        const KVOutcome outcome = get(*made->store, i);
        wrong += outcome == KVOutcome::kFailed;
        right += outcome == KVOutcome::kDone;
      }
    };
    std::vector<std::thread> threads;
    for (uint32_t seed = 0; seed < 3; ++seed) threads.emplace_back(use, seed);
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
    CHECK(right > 0);
    CHECK(made->store->stats().dropped == 0);
  }

  SUBCASE("refuses buffers of the wrong size, by name") {
    const auto made = make<kStore>(4);
    std::vector<std::byte> buffer(99);
    CHECK_THROWS_WITH_AS(made->store->put(key_of(0), buffer),
                         "put: payload: expected 100 bytes, got 99", InvalidArgument);
    CHECK_THROWS_WITH_AS(made->store->get(key_of(0), buffer),
                         "get: out: expected 100 bytes, got 99", InvalidArgument);
    CHECK(made->store->stats().num_pending == 0);
  }
}

TEST_CASE_TEMPLATE_INVOKE(store, std::integral_constant<int, 0>, std::integral_constant<int, 1>);

TEST_CASE("bad configurations are refused by name") {
  CHECK_THROWS_WITH_AS(make_host_store({100, 0}),
                       "HostStore: block_bytes: expected 1 or more, got 0", InvalidArgument);
  CHECK_THROWS_WITH_AS(
      make_host_store({99, 100}),
      "HostStore: capacity_bytes: expected room for 1 to 2^31 - 2 blocks of 100 bytes, got 99",
      InvalidArgument);
  CHECK_THROWS_WITH_AS(make_host_store({100, 10, 0}),
                       "KVStore: max_pending: expected 1 or more, got 0", InvalidArgument);
}

TEST_CASE("CRC-32C: the check value of the standard, and both implementations") {
  const std::string digits = "123456789";
  CHECK(crc32c(std::as_bytes(std::span(digits))) == 0xe3069283);
  for (size_t size = 0; size < 70; ++size) {
    const auto data = payload_of(static_cast<int32_t>(size), size);
    CHECK(crc32c(data) == crc32c_portable(data));
  }
}
