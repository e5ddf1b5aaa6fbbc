// SPDX-License-Identifier: Apache-2.0
// A manager and the one that its snapshot becomes answer the same calls alike, to the block id.
#include <doctest/doctest.h>

#include <map>
#include <random>
#include <set>
#include <string>

#include "kv_traffic.h"
#include "quire/error.h"

using namespace quire;
using Ids = std::vector<int32_t>;

namespace {

struct Random {
  std::mt19937 engine;
  uint32_t next() { return static_cast<uint32_t>(engine()); }
};

KVCacheOptions options_of(uint32_t seed) {
  KVCacheOptions options;
  options.eviction = seed % 2 ? Eviction::kReuseLru : Eviction::kLru;
  options.num_host_blocks = seed % 3 ? 8 : 0;
  options.event_capacity = seed % 5 ? 0 : 4096;
  using Kind = LayerGroup::Kind;
  const std::vector<LayerGroup> models[] = {{},
                                            {{}, {Kind::kSlidingWindow, 5}},
                                            {{}, {Kind::kState, 0}},
                                            {{}, {Kind::kChunkedLocal, 6}, {Kind::kState, 0}}};
  options.groups = models[seed % 4];
  return options;
}

// Two managers that are asked the same; sequence ids, which are never given twice, are translated.
struct Pair {
  KVCacheManager& a;
  KVCacheManager& b;
  std::map<int64_t, SequenceId> twins;  // by id in a

  SequenceId twin(SequenceId seq) const {
    const auto found = twins.find(seq.value);
    return found == twins.end() ? seq : found->second;
  }
  std::vector<SequenceId> twin(std::span<const SequenceId> seqs) const {
    std::vector<SequenceId> result;
    for (SequenceId seq : seqs) result.push_back(twin(seq));
    return result;
  }

  // Runs a call of both; the second must be refused where the first was.
  template <class F, class G>
  auto both(F first, G second) -> decltype(first()) {
    try {
      return first();
    } catch (const InvalidArgument&) {
      CHECK_THROWS_AS(second(), InvalidArgument);
      throw;
    }
  }

  SequenceId add(SequenceId seq, SequenceId other) {
    twins[seq.value] = other;
    for (int32_t group = 0; group < a.num_groups(); ++group)
      REQUIRE(a.block_table(seq, group) == b.block_table(other, group));
    return seq;
  }
  SequenceId create(std::span<const int32_t> tokens, Salt salt = {}, Retention retention = {}) {
    return add(a.create(tokens, salt, retention), b.create(tokens, salt, retention));
  }
  SequenceId open(std::span<const int32_t> tokens, Salt salt = {}) {
    return add(a.open(tokens, salt), b.open(tokens, salt));
  }
  void attach(SequenceId seq) {
    const auto second = [&] { b.attach(twin(seq)); };
    both([&] { a.attach(seq); }, second);
    second();
    add(seq, twin(seq));
  }
  void detach(SequenceId seq) {
    const auto second = [&] { b.detach(twin(seq)); };
    both([&] { a.detach(seq); }, second);
    second();
  }
  int64_t pin(std::span<const int32_t> tokens, Salt salt) {
    return same(a.pin(tokens, salt), b.pin(tokens, salt));
  }
  int64_t unpin(std::span<const int32_t> tokens, Salt salt) {
    return same(a.unpin(tokens, salt), b.unpin(tokens, salt));
  }
  int64_t pin(SequenceId seq) { return same(a.pin(seq), b.pin(twin(seq))); }
  int64_t unpin(SequenceId seq) { return same(a.unpin(seq), b.unpin(twin(seq))); }
  int64_t clear_cache() { return same(a.clear_cache(), b.clear_cache()); }
  int64_t same(int64_t first, int64_t second) {
    REQUIRE(first == second);
    return first;
  }
  void fork(SequenceId seq, std::span<SequenceId> children) {
    for (SequenceId& child : children) child = fork(seq);
  }
  SequenceId fork(SequenceId seq) {
    const SequenceId child = both([&] { return a.fork(seq); }, [&] { b.fork(twin(seq)); });
    return add(child, b.fork(twin(seq)));
  }
  const StepBatch* step(std::span<const SequenceId> seqs, std::span<const int32_t> counts,
                        int32_t lookahead = 0) {
    const StepBatch* batch = both([&] { return a.step(seqs, counts, lookahead); },
                                  [&] { b.step(twin(seqs), counts, lookahead); });
    const StepBatch* other = b.step(twin(seqs), counts, lookahead);
    REQUIRE((batch == nullptr) == (other == nullptr));
    if (!batch) return batch;
    REQUIRE(std::ranges::equal(batch->slot_mapping(), other->slot_mapping()));
    REQUIRE(std::ranges::equal(batch->copies(), other->copies()));
    REQUIRE(batch->ticket() == other->ticket());
    for (int32_t group = 0; group < a.num_groups(); ++group) {
      REQUIRE(std::ranges::equal(a.batch(group).copies(), b.batch(group).copies()));
      for (SequenceId seq : seqs)
        REQUIRE(a.block_table(seq, group) == b.block_table(twin(seq), group));
    }
    return batch;
  }
  void commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled = {},
              std::span<const int32_t> counts = {}) {
    const auto second = [&] { b.commit(twin(seqs), sampled, counts); };
    both([&] { a.commit(seqs, sampled, counts); }, second);
    second();
  }
  void truncate(SequenceId seq, int64_t num_tokens) {
    const auto second = [&] { b.truncate(twin(seq), num_tokens); };
    both([&] { a.truncate(seq, num_tokens); }, second);
    second();
  }
  void free(std::span<const SequenceId> seqs) {
    const auto second = [&] { b.free(twin(seqs)); };
    both([&] { a.free(seqs); }, second);
    second();
  }
  void retire(int64_t ticket) {
    both([&] { a.retire(ticket); }, [&] { b.retire(ticket); });
    b.retire(ticket);
  }
  auto swap_out(SequenceId seq) {
    const auto pairs = both([&] { return a.swap_out(seq); }, [&] { b.swap_out(twin(seq)); });
    REQUIRE(b.swap_out(twin(seq)) == pairs);
    return pairs;
  }
  auto swap_in(SequenceId seq) {
    const auto pairs = both([&] { return a.swap_in(seq); }, [&] { b.swap_in(twin(seq)); });
    REQUIRE(b.swap_in(twin(seq)) == pairs);
    return pairs;
  }
};

}  // namespace

TEST_CASE("a restored manager goes on as the one that was saved") {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    const kv_traffic::Shape shape{
        .num_blocks = 6 + static_cast<int32_t>(seed % 24) * static_cast<int32_t>(1 + seed % 3),
        .block_size = 1 + static_cast<int32_t>(seed % 5),
        .prefix_caching = seed % 7 != 0,
        .async_depth = static_cast<int32_t>(seed % 3),
        .max_seqs = 6,
        .max_tokens = 60};
    KVCacheManager manager(shape.num_blocks, shape.block_size, shape.prefix_caching,
                           shape.async_depth, options_of(seed));
    Random random{std::mt19937(seed)};
    kv_traffic::Traffic before(manager, manager, shape, random);
    for (int turn = 0; turn < 200; ++turn) before.call();

    const std::string saved = manager.snapshot();
    KVCacheManager restored = KVCacheManager::restore(saved);
    REQUIRE((kv_traffic::without_times(restored.snapshot()) == kv_traffic::without_times(saved)));
    REQUIRE(restored.sequences() == manager.sequences());
    std::set<int32_t> announced;
    for (const CacheEvent& event : restored.take_events()) announced.insert(event.block);
    const Ids cached = manager.cached_blocks();
    if (options_of(seed).event_capacity > 0 && shape.prefix_caching)
      REQUIRE(announced == std::set<int32_t>(cached.begin(), cached.end()));

    Pair pair{manager, restored, {}};
    kv_traffic::Traffic after(pair, manager, shape, random);
    after.adopt(before);
    for (int turn = 0; turn < 300; ++turn) {
      after.call();
      manager.validate();
      restored.validate();
      REQUIRE(manager.cached_blocks() == restored.cached_blocks());
    }
    after.free_all();
    CHECK(restored.stats().used_blocks == 0);
  }
}

TEST_CASE("new sequences of a restored manager are not mixed up with the saved ones") {
  KVCacheManager manager(8, 4);
  const SequenceId seq = manager.create(Ids{1, 2, 3});
  KVCacheManager restored = KVCacheManager::restore(manager.snapshot());
  CHECK(restored.tokens(seq) == Ids{1, 2, 3});
  CHECK(restored.create(Ids{4}).value > seq.value);
}

TEST_CASE("priorities, pins and times to live outlive a restart") {
  KVCacheManager manager(8, 2);
  const auto run = [](KVCacheManager& m, const Ids& tokens, Retention retention = {}) {
    const SequenceId seq = m.create(tokens, {}, retention);
    const Ids count{static_cast<int32_t>(m.num_tokens(seq) - m.num_computed_tokens(seq))};
    REQUIRE(m.step({&seq, 1}, count));
    m.commit({&seq, 1});
    m.free({&seq, 1});
  };
  run(manager, {1, 2}, {.priority = 50});
  run(manager, {3, 4}, {.priority = 90, .ttl = 0});
  run(manager, {5, 6});
  CHECK(manager.pin(Ids{5, 6}) == 2);
  KVCacheManager restored = KVCacheManager::restore(manager.snapshot());
  for (KVCacheManager* m : {&manager, &restored}) {
    run(*m, {21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32});  // the free ones, and one more
    CHECK(m->match(Ids{1, 2, 0}).num_tokens == 2);
    CHECK(m->match(Ids{3, 4, 0}).num_tokens == 0);
    CHECK(m->match(Ids{5, 6, 0}).num_tokens == 2);
    CHECK(m->unpin(Ids{5, 6}) == 2);
    m->validate();
  }
}

TEST_CASE("times to live count whatever a snapshot says of there being some") {
  KVCacheManager manager(8, 4);
  const SequenceId seq = manager.create(std::vector<int32_t>(9, 1), {}, {.ttl = 1});
  std::string saved = manager.snapshot();
  const std::string flag = "\"has_retention\":[";
  saved[saved.find(flag) + flag.size()] = '0';
  KVCacheManager restored = KVCacheManager::restore(saved);
  restored.create(std::vector<int32_t>(5, 2), {}, {.priority = 3});
  const int32_t count = 9;
  REQUIRE(restored.step({&seq, 1}, {&count, 1}));
  restored.commit({&seq, 1});
  restored.free({&seq, 1});
  restored.validate();
  CHECK(restored.stats().cached_blocks == 3);
}

TEST_CASE("what is no snapshot is refused, however it is broken") {
  CHECK_THROWS_AS(KVCacheManager::restore(""), InvalidArgument);
  CHECK_THROWS_AS(KVCacheManager::restore("{}"), InvalidArgument);
  CHECK_THROWS_AS(KVCacheManager::restore("[1, 2]"), InvalidArgument);
  CHECK_THROWS_AS(KVCacheManager::restore(R"({"manager": [2, 8, 4, 1, 0]})"), InvalidArgument);
  const kv_traffic::Shape shape{12, 3, true, 1, 6, 40};
  KVCacheManager manager(12, 3, true, 1, options_of(1));
  Random random{std::mt19937(3)};
  kv_traffic::Traffic traffic(manager, manager, shape, random);
  for (int turn = 0; turn < 150; ++turn) traffic.call();
  const std::string saved = manager.snapshot();
  int num_refused = 0;
  for (int n = 0; n < 3000; ++n) {
    std::string broken = saved;
    const size_t at = random.next() % broken.size();
    if (n % 3 == 0)
      broken.resize(at);
    else if (n % 3 == 1)
      broken.erase(at, 1);
    else if (broken[at] >= '0' && broken[at] <= '9')
      broken[at] = static_cast<char>('0' + random.next() % 10);
    try {
      KVCacheManager restored = KVCacheManager::restore(broken);
      kv_traffic::Traffic more(restored, restored, shape, random);  // consistent, if not the same
      for (int turn = 0; turn < 20; ++turn) more.call();
      restored.validate();
    } catch (const InvalidArgument&) {
      ++num_refused;
    }
  }
  CHECK(num_refused > 1500);
}
