// SPDX-License-Identifier: Apache-2.0
// Memory runs out in each call of a scheduler: no request and no block is lost, and every copy is
// told of in the right order. The KV is a token a slot here, so that it can be looked at.
#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <vector>

#include "out_of_memory.h"
#include "quire/kv_store.h"
#include "quire/scheduler.h"

namespace {

using namespace out_of_memory;
using quire::KVCacheManager;
using quire::ScheduledBatch;
using quire::Scheduler;
using Kind = quire::LayerGroup::Kind;

constexpr int32_t kBlockSize = 4;

class Engine {
 public:
  Engine(KVCacheManager& manager, const quire::SchedulerConfig& config, uint32_t seed)
      : manager_(manager),
        scheduler_(manager, config),
        random_(seed),
        pool_(manager.stats().num_blocks * kBlockSize, -1),
        host_(manager.stats().num_host_blocks * kBlockSize, -1) {}

  void run(int num_rounds) {
    for (int round = 0; round < num_rounds || scheduler_.has_work(); ++round) {
      if (round < num_rounds && scheduler_.num_waiting() < 5 && below(2)) add();
      if (below(12) == 0) finish_one();
      if (!manager_.may_step()) retire();
      const ScheduledBatch* batch =
          until_it_works([&] { return scheduler_.schedule(); }, [&] { check(); });
      take_offers();
      if (!batch) {  // nothing to do, or all blocks wait
        if (manager_.num_deferred_refs() > 0) retire();
        continue;
      }
      compute(*batch);
      if (below(12) == 0) finish_one();
      commit(*batch);
    }
    CHECK(known_.empty());
  }

  const Scheduler& scheduler() const { return scheduler_; }
  int64_t num_swapped() const { return num_swapped_; }
  int64_t num_offers() const { return num_offers_; }

 private:
  uint32_t below(uint32_t bound) { return random_() % bound; }

  void check() {
    scheduler_.validate();
    REQUIRE(scheduler_.num_running() + scheduler_.num_waiting() ==
            static_cast<int32_t>(known_.size()));
    REQUIRE(manager_.num_sequences() == static_cast<int32_t>(known_.size()));
  }

  void add() {
    Ids prompt(1 + below(20), static_cast<int32_t>(below(2)));
    prompt.back() = static_cast<int32_t>(below(5));
    const int32_t num_new = 1 + static_cast<int32_t>(below(16));
    const std::string tenant = "tenant " + std::to_string(below(3)) + std::string(30, '.');
    const quire::RequestOptions options{static_cast<int32_t>(below(2)), tenant};
    const quire::Salt salt = below(4) ? quire::Salt() : quire::Salt(tenant);
    const int32_t id = until_it_works(
        [&] { return scheduler_.add(prompt, num_new, salt, options); }, [&] { check(); });
    REQUIRE(id == num_added_++);
    ends_[id] = static_cast<int32_t>(prompt.size()) + num_new;
    known_[id] = prompt;
    salts_[id] = salt ? tenant : "";
    check();
  }

  // Whichever it is, in whatever state.
  void finish_one() {
    if (known_.empty()) return;
    auto request = known_.begin();
    std::advance(request, below(static_cast<uint32_t>(known_.size())));
    until_it_works([&] { scheduler_.finish(request->first); }, [&] { check(); });
    known_.erase(request);
    check();
  }

  void retire() {
    until_it_works([&] { manager_.retire(retired_ + 1); }, [&] { check(); });
    ++retired_;
  }

  // Each whole block that is evicted is offered once, with its contents: the store stays empty.
  void take_offers() {
    for (const quire::CacheEvent& event : manager_.take_events())
      num_evicted_ += event.kind == quire::CacheEventKind::kSwapped;
    for (const quire::KVTransfer& offer : manager_.take_offloads()) {
      ++num_offers_;
      const auto known = contents_.find(offer.key.bytes);
      REQUIRE(known != contents_.end());
      REQUIRE(std::equal(known->second.begin(), known->second.end(),
                         pool_.begin() + offer.block * kBlockSize));
    }
    REQUIRE(num_offers_ == num_evicted_);
  }

  static void copy(const Ids& from, int32_t source, Ids& to, int32_t destination) {
    std::copy_n(from.begin() + source * kBlockSize, kBlockSize,
                to.begin() + destination * kBlockSize);
  }

  void compute(const ScheduledBatch& batch) {
    num_swapped_ += static_cast<int64_t>(batch.swap_in.size()) / 2;
    for (size_t i = 0; i < batch.swap_out.size(); i += 2)
      copy(pool_, batch.swap_out[i], host_, batch.swap_out[i + 1]);
    for (size_t i = 0; i < batch.swap_in.size(); i += 2)
      copy(host_, batch.swap_in[i], pool_, batch.swap_in[i + 1]);
    for (int32_t group = 0; group < manager_.num_groups(); ++group) {
      const auto& copies = manager_.batch(group).copies();
      for (size_t i = 0; i < copies.size(); i += 2) copy(pool_, copies[i], pool_, copies[i + 1]);
    }
    const quire::StepBatch& step = *batch.step;
    REQUIRE(step.positions().size() == batch.token_ids.size());
    for (size_t i = 0; i < batch.token_ids.size(); ++i)
      pool_[step.slot_mapping()[i]] = batch.token_ids[i];
    for (size_t row = 0; row < batch.request_ids.size(); ++row) {
      const Ids& tokens = known_.at(batch.request_ids[row]);
      const int32_t* const blocks = step.block_table().data() + row * step.block_table_stride();
      REQUIRE(step.seq_lens()[row] <= static_cast<int32_t>(tokens.size()));
      for (int32_t at = 0; at < step.seq_lens()[row]; ++at)
        REQUIRE(pool_[blocks[at / kBlockSize] * kBlockSize + at % kBlockSize] == tokens[at]);
      note_contents(tokens, step.seq_lens()[row], salts_.at(batch.request_ids[row]));
    }
  }

  void note_contents(const Ids& tokens, int32_t count, const std::string& salt) {
    quire::ChainKey key = salt.empty() ? quire::root_key() : quire::root_key(salt);
    for (int32_t at = 0; at + kBlockSize <= count; at += kBlockSize) {
      const Ids block(tokens.begin() + at, tokens.begin() + at + kBlockSize);
      key = quire::chain_key(key, block);
      contents_[key.bytes] = block;
    }
  }

  void commit(const ScheduledBatch& batch) {
    Ids sampled(batch.sampling.size());
    for (int32_t& token : sampled) token = static_cast<int32_t>(below(3));
    const auto finished =
        until_it_works([&] { return scheduler_.commit(sampled); }, [&] { scheduler_.validate(); });
    for (size_t i = 0; i < sampled.size(); ++i) {
      const auto request = known_.find(batch.request_ids[batch.sampling[i]]);
      if (request != known_.end()) request->second.push_back(sampled[i]);
    }
    for (int32_t id : finished) {
      REQUIRE(static_cast<int32_t>(known_.at(id).size()) == ends_.at(id));
      known_.erase(id);
    }
    check();
  }

  KVCacheManager& manager_;
  Scheduler scheduler_;
  std::mt19937 random_;
  Ids pool_, host_;                  // [num_blocks, kBlockSize] tokens
  std::map<int32_t, Ids> known_;     // tokens of requests that have not ended
  std::map<int32_t, int32_t> ends_;  // how many tokens each has in the end
  std::map<int32_t, std::string> salts_;
  std::map<std::array<uint8_t, 32>, Ids> contents_;  // of whole blocks, by chain key
  int64_t num_offers_ = 0, num_evicted_ = 0;
  int32_t num_added_ = 0;
  int64_t retired_ = 0;
  int64_t num_swapped_ = 0;  // blocks
};

// Swapping seems to cost nothing; or recomputing does.
quire::SchedulerConfig config_of(bool swaps) {
  return {.max_tokens_per_step = 16,
          .max_seqs = 5,
          .prefix_window = 2,
          .max_overtakes = 4,
          .preemption = {
              .seconds_per_token = 1, .bytes_per_second = swaps ? 1e12 : 0, .bytes_per_block = 1}};
}

void check_scheduler(uint32_t seed, bool swaps, int32_t async_depth,
                     const quire::KVCacheOptions& options, const quire::KVStore* store = nullptr) {
  const int32_t num_blocks = options.groups.empty() ? 14 : 24;
  KVCacheManager manager(num_blocks, kBlockSize, true, async_depth, options);
  if (store) manager.attach_store(*store);
  num_failures = 0;
  {
    Engine engine(manager, config_of(swaps), seed);
    engine.run(250);
    // How often depends on the compiler: in which order it calls below() for arguments.
    CHECK(engine.scheduler().num_preemptions() > 0);
    CHECK((engine.num_swapped() > 0) == swaps);
    CHECK((engine.num_offers() > 0) == (store != nullptr));
  }
  manager.validate();
  CHECK(manager.num_sequences() == 0);
  CHECK(num_failures > 500);
}

}  // namespace

TEST_CASE("a scheduler out of memory") { check_scheduler(1, false, 0, {}); }

TEST_CASE("a scheduler out of memory, with events, and host memory for who is preempted") {
  check_scheduler(2, true, 0, {.event_capacity = 100, .num_host_blocks = 40});
}

TEST_CASE("a scheduler out of memory while steps run") {
  check_scheduler(3, false, 2, {});
  check_scheduler(4, true, 2, {.num_host_blocks = 40});
}

TEST_CASE("a scheduler out of memory offers each evicted block to a store, once") {
  const auto store = quire::make_host_store({.capacity_bytes = 1, .block_bytes = 1});
  check_scheduler(7, true, 0, {.event_capacity = 1000, .num_host_blocks = 40}, store.get());
  check_scheduler(8, true, 2, {.event_capacity = 1000, .num_host_blocks = 40}, store.get());
}

TEST_CASE("a scheduler out of memory with several layer groups") {
  check_scheduler(5, false, 0, {.groups = {{}, {Kind::kSlidingWindow, 6}}});
  check_scheduler(6, true, 0, {.num_host_blocks = 60, .groups = {{}, {Kind::kState}}});
}
