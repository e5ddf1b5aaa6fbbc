// SPDX-License-Identifier: Apache-2.0
// Preemption by swapping: what comes back from host memory is what went there.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "quire/scheduler.h"

using quire::KVCacheManager;
using quire::ScheduledBatch;
using quire::Scheduler;
using quire::SchedulerConfig;
using Ids = std::vector<int32_t>;

namespace {

Ids range(int32_t first, int32_t count) {
  Ids tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// What the state of these tokens is.
int32_t state_of(const Ids& tokens, int32_t count) {
  uint32_t state = 1;
  for (int32_t i = 0; i < count; ++i) state = state * 31 + static_cast<uint32_t>(tokens[i]);
  return static_cast<int32_t>(state);
}

// Device and host memory of a scheduler, a number a slot: what the step wrote, and what the copies
// made of it. Every token that a step reads must be the one that its request knows, in each layer
// group, and every state that of the tokens before.
struct Memory {
  int32_t block_size;
  Ids device, host;

  Memory(int32_t num_blocks, int32_t num_host_blocks, int32_t block_size_)
      : block_size(block_size_),
        device(num_blocks * block_size_, -1),
        host(num_host_blocks * block_size_, -1) {}

  template <class Pairs>
  void copy(const Ids& from, Ids& to, const Pairs& pairs) const {
    for (size_t i = 0; i < pairs.size(); i += 2)
      std::copy_n(from.begin() + pairs[i] * block_size, block_size,
                  to.begin() + pairs[i + 1] * block_size);
  }

  void run(const ScheduledBatch& batch, std::map<int32_t, Ids>& known,
           const KVCacheManager& manager) {
    copy(device, host, batch.swap_out);
    copy(host, device, batch.swap_in);
    for (int32_t group = 0; group < manager.num_groups(); ++group)
      copy(Ids(device), device, manager.batch(group).copies());
    for (int32_t group = 0; group < manager.num_groups(); ++group) {
      const quire::StepBatch& step = manager.batch(group);
      const bool is_state = manager.group(group).kind == quire::LayerGroup::Kind::kState;
      for (size_t i = 0; i < step.slot_mapping().size(); ++i)
        device[step.slot_mapping()[i]] = batch.token_ids[i];
      for (size_t row = 0; row < batch.request_ids.size(); ++row) {
        const Ids& tokens = known.at(batch.request_ids[row]);
        const int32_t* table = step.block_table().data() + row * step.block_table_stride();
        if (is_state)
          update_state(table[0], tokens, batch.step->seq_lens()[row], batch.num_new_tokens[row]);
        else
          check_row(table, tokens, step.seq_lens()[row]);
      }
    }
  }

  void check_row(const int32_t* table, const Ids& tokens, int32_t count) const {
    Ids read, expected;
    for (int32_t t = 0; t < count; ++t) {
      if (table[t / block_size] < 0) continue;  // behind a window
      read.push_back(device[table[t / block_size] * block_size + t % block_size]);
      expected.push_back(tokens[t]);
    }
    CHECK(read == expected);
  }

  void update_state(int32_t block, const Ids& tokens, int32_t end, int32_t num_new) {
    int32_t& state = device[block * block_size];
    if (end > num_new) CHECK(state == state_of(tokens, end - num_new));
    state = state_of(tokens, end);
  }
};

struct SwapRun {
  std::map<int32_t, Ids> tokens;
  int64_t num_out = 0, num_in = 0;  // blocks
  std::string explanations;
};

// Some requests through a small pool, some of them ended early; validated at each turn.
SwapRun run_swapping(uint32_t seed, int32_t num_host_blocks, bool prefix_caching, int32_t depth,
                     const std::vector<quire::LayerGroup>& groups = {}) {
  std::mt19937 random(seed);
  const int32_t block_size = 1 + static_cast<int32_t>(random() % 6);
  const int32_t num_blocks = (64 / block_size + 1) * std::max<int32_t>(1, groups.size());
  KVCacheManager manager(num_blocks, block_size, prefix_caching, depth,
                         {.num_host_blocks = num_host_blocks, .groups = groups});
  SchedulerConfig config{.max_tokens_per_step = 4 + static_cast<int32_t>(random() % 20),
                         .max_seqs = 2 + static_cast<int32_t>(random() % 6),
                         .watermark = 0};
  config.preemption.seconds_per_token = 1;  // so that moving is cheaper from 2 own tokens on
  config.preemption.bytes_per_second = 1;
  config.preemption.seconds_per_swap = 0.5;
  Scheduler scheduler(manager, config);
  Memory memory(num_blocks, num_host_blocks, block_size);
  SwapRun result;
  for (int32_t i = 0; i < 12; ++i) {
    Ids prompt = range(0, 1 + static_cast<int32_t>(random() % 30));
    if (random() % 2) prompt[0] = static_cast<int32_t>(random() % 1000);
    result.tokens[scheduler.add(prompt, 1 + static_cast<int32_t>(random() % 30))] = prompt;
  }
  int64_t last = 0, retired = 0;
  for (int turn = 0; scheduler.has_work(); ++turn) {
    REQUIRE(turn < 10'000);
    if (turn == 20 || turn == 30) {  // running, waiting, swapped out or ended
      scheduler.finish(turn / 10);
      result.tokens.erase(turn / 10);
      scheduler.validate();
    }
    if (depth > 0 && last - retired == depth) manager.retire(++retired);
    const ScheduledBatch* batch = scheduler.schedule();
    result.explanations += scheduler.explain();
    scheduler.validate();
    if (!batch) {
      if (retired < last) manager.retire(++retired);
      continue;
    }
    last = batch->step->ticket();
    result.num_out += static_cast<int64_t>(batch->swap_out.size() / 2);
    result.num_in += static_cast<int64_t>(batch->swap_in.size() / 2);
    memory.run(*batch, result.tokens, manager);
    Ids sampled;
    for (int32_t row : batch->sampling) {
      const int32_t id = batch->request_ids[row];
      sampled.push_back(1000 * (1 + id) + batch->step->seq_lens()[row]);
      result.tokens.at(id).push_back(sampled.back());
    }
    scheduler.commit(sampled);
    scheduler.validate();
  }
  while (depth > 0 && retired < last) manager.retire(++retired);
  CHECK(manager.allocator().num_used() == 0);
  CHECK(manager.stats().swapped_blocks == 0);
  CHECK(manager.num_sequences() == 0);
  return result;
}

}  // namespace

TEST_CASE("requests that wait in host memory end with the same tokens, and leave nothing there") {
  int64_t num_out = 0, num_in = 0;
  for (int32_t depth : {0, 2})
    for (bool prefix_caching : {true, false})
      for (uint32_t seed = 0; seed < 25; ++seed) {
        const SwapRun recomputed = run_swapping(seed, 0, prefix_caching, depth);
        CHECK(recomputed.num_out + recomputed.num_in == 0);
        for (int32_t num_host_blocks : {4, 200}) {
          const SwapRun swapped = run_swapping(seed, num_host_blocks, prefix_caching, depth);
          CHECK(swapped.tokens == recomputed.tokens);
          CHECK(swapped.num_in <= swapped.num_out);
          const auto says = [&](const char* what) {
            return swapped.explanations.find(what) != std::string::npos;
          };
          CHECK(says("tokens move to host memory") == (swapped.num_out > 0));
          CHECK(says("tokens back from host memory") == (swapped.num_in > 0));
          num_out += swapped.num_out;
          num_in += swapped.num_in;
        }
      }
  CHECK(num_out > 100);
  CHECK(num_in > 100);
}

TEST_CASE("requests of several layer groups wait in host memory and end with the same tokens") {
  using Kind = quire::LayerGroup::Kind;
  const std::vector<std::vector<quire::LayerGroup>> models = {
      {{}, {Kind::kSlidingWindow, 5}},
      {{}, {Kind::kChunkedLocal, 8}},
      {{}, {Kind::kState, 0}},
      {{}, {Kind::kSlidingWindow, 9}, {Kind::kState, 0}},
  };
  for (const auto& groups : models) {
    int64_t num_out = 0, num_in = 0;
    for (int32_t depth : {0, 2})
      for (bool prefix_caching : {true, false})
        for (uint32_t seed = 0; seed < 12; ++seed) {
          const SwapRun recomputed = run_swapping(seed, 0, prefix_caching, depth, groups);
          const SwapRun swapped = run_swapping(seed, 200, prefix_caching, depth, groups);
          CHECK(swapped.tokens == recomputed.tokens);
          CHECK(swapped.num_in <= swapped.num_out);
          num_out += swapped.num_out;
          num_in += swapped.num_in;
        }
    CHECK(num_out > 100);
    CHECK(num_in > 100);
  }
}

namespace {

// A store that has nothing and remembers what it could have had.
struct EmptyStore final : quire::KVStore {
  std::shared_ptr<quire::KVTicket> put(const quire::ChainKey&, std::span<const std::byte>,
                                       OnDone) override {
    return nullptr;
  }
  std::shared_ptr<quire::KVTicket> get(const quire::ChainKey&, std::span<std::byte>,
                                       OnDone) override {
    return nullptr;
  }
  bool contains(const quire::ChainKey&) const noexcept override { return false; }
  bool erase(const quire::ChainKey&) override { return false; }
  void drain() override {}
  size_t block_bytes() const override { return 4; }
  quire::KVStoreStats stats() const override { return {}; }
};

}  // namespace

TEST_CASE("what a request evicts as it comes back is offered to the stores") {
  const EmptyStore store;
  KVCacheManager manager(12, 4, true, 0, {.event_capacity = 10'000, .num_host_blocks = 40});
  manager.attach_store(store);
  quire::PreemptionCosts costs{.seconds_per_token = 1, .bytes_per_second = 1};
  Scheduler scheduler(manager, {.max_tokens_per_step = 16, .watermark = 0, .preemption = costs});
  for (int32_t i = 0; i < 8; ++i) scheduler.add(range(100 * i, 9), 20);
  int64_t num_swapped_in = 0, num_offered_with_them = 0;
  while (scheduler.has_work()) {
    const ScheduledBatch* batch = scheduler.schedule();
    REQUIRE(batch);
    // Each eviction of a whole block is an offer: none is lost on the way.
    std::vector<quire::ChainKey> evicted, offered;
    for (const quire::CacheEvent& event : manager.take_events())
      if (event.kind == quire::CacheEventKind::kSwapped) evicted.push_back(event.key);
    for (const quire::KVTransfer& offer : manager.take_offloads()) offered.push_back(offer.key);
    CHECK(offered == evicted);
    num_swapped_in += static_cast<int64_t>(batch->swap_in.size() / 2);
    if (batch->swap_in.size() > 0) num_offered_with_them += static_cast<int64_t>(offered.size());
    Ids sampled;
    for (int32_t row : batch->sampling) sampled.push_back(1000 + batch->request_ids[row]);
    scheduler.commit(sampled);
    manager.take_events();
  }
  CHECK(num_swapped_in > 0);
  CHECK(num_offered_with_them > 0);
}

TEST_CASE("where moving costs more, or there is no host memory: computed again") {
  quire::PreemptionCosts costs;
  costs.seconds_per_token = 1;
  costs.bytes_per_second = 1;
  const quire::PreemptionCosts dear{
      .seconds_per_token = 1, .bytes_per_second = 1, .seconds_per_swap = 1000};
  struct Case {
    quire::PreemptionCosts costs;
    int32_t num_host_blocks, num_groups;
    bool swaps;
  };
  for (const auto& [given, num_host_blocks, num_groups, swaps] :
       {Case{costs, 8, 1, true}, Case{costs, 0, 1, false}, Case{costs, 16, 2, true},
        Case{dear, 8, 1, false}, Case{{}, 8, 1, false}}) {
    quire::KVCacheOptions options{.num_host_blocks = num_host_blocks};
    options.groups.resize(num_groups);
    KVCacheManager manager(6 * num_groups, 4, false, 0, options);
    Scheduler scheduler(manager, {.watermark = 0, .preemption = given});
    for (int32_t i = 0; i < 2; ++i) scheduler.add(range(100 * i, 8), 12);
    size_t num_out = 0;
    while (const ScheduledBatch* batch = scheduler.schedule()) {
      num_out += batch->swap_out.size();
      scheduler.commit(Ids(batch->sampling.size(), 5));
      scheduler.validate();
    }
    CHECK(scheduler.num_preemptions() > 0);
    CHECK((num_out > 0) == swaps);
  }
}
