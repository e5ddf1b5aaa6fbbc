// SPDX-License-Identifier: Apache-2.0
// Memory that runs out in the calling thread, on purpose; test_out_of_memory.cpp has the hooks.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <new>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "quire/kv_cache_manager.h"

namespace out_of_memory {

using Ids = std::vector<int32_t>;

extern thread_local int64_t allocations_left;  // until one fails; -1: none does
inline int64_t num_failures = 0;

// Makes a call again and again, each time with one allocation more, until it works.
template <class Call, class Check>
auto until_it_works(Call call, Check check) {
  for (int64_t n = 0;; ++n) {
    try {
      struct Disarm {
        ~Disarm() { allocations_left = -1; }
      } disarm;
      allocations_left = n;
      return call();
    } catch (const std::bad_alloc&) {
      ++num_failures;
    }
    check();
  }
}

// A list of numbers in a snapshot; nothing where it has none of this name.
inline std::string list_in(const std::string& snapshot, const std::string& name) {
  const size_t at = snapshot.find("\"" + name + "\"");
  if (at == std::string::npos) return {};
  return snapshot.substr(at, snapshot.find(']', at) - at) + '\n';
}

// What can be told of each sequence.
inline std::string sequences_of(const quire::KVCacheManager& manager) {
  std::ostringstream state;
  state << "cached";
  for (int32_t block : manager.cached_blocks()) state << ' ' << block;
  state << '\n';
  for (quire::SequenceId seq : manager.sequences()) {
    state << seq.value << ' ' << manager.num_computed_tokens(seq) << ' '
          << manager.num_cached_tokens(seq) << ' ' << manager.is_swapped_out(seq) << " tokens";
    for (int32_t token : manager.tokens(seq)) state << ' ' << token;
    for (int32_t group = 0; group < manager.num_groups(); ++group) {
      state << " blocks";
      for (int32_t block : manager.block_table(seq, group)) state << ' ' << block;
    }
    state << '\n';
  }
  return state.str();
}

// All that a manager's callers can tell, and the order of eviction. (What saves time alone may
// differ: a trunk that no child came to share, the root of a salt, sequences that a commit left
// ready to decode on.) Its time must stand still where something has a time to live.
inline std::string state_of(const quire::KVCacheManager& manager) {
  const std::string snapshot = manager.snapshot();
  std::ostringstream state;
  for (const char* name : {"allocator", "counts", "batch", "manager", "deferred"}) {
    const std::string list = list_in(snapshot, name);
    REQUIRE(!list.empty());
    state << list;
  }
  for (const char* name : {"companions", "host", "pins", "expiries", "swapped", "reuse"})
    state << list_in(snapshot, name);
  state << sequences_of(manager);
  return state.str();
}

// A manager all of whose calls run out of memory first. Also follows its events: what they tell of
// is what is cached.
class Short {
 public:
  using Salt = quire::Salt;
  using SequenceId = quire::SequenceId;
  using Seqs = std::span<const SequenceId>;
  using Tokens = std::span<const int32_t>;

  explicit Short(quire::KVCacheManager& manager) : manager_(manager) {}

  template <class Call>
  auto attempt(Call call) {
    follow();
    keep_offloads();
    const std::string before = state_of(manager_);
    return until_it_works(call, [&] {
      manager_.validate();
      REQUIRE(state_of(manager_) == before);
      REQUIRE(manager_.take_events().empty());
      REQUIRE(manager_.take_offloads().empty());
    });
  }
  void keep_offloads() {
    for (const quire::KVTransfer& offer : manager_.take_offloads()) offloads_.push_back(offer);
  }
  std::vector<quire::KVTransfer>& offloads() { return offloads_; }
  // What happened since the last look. Without events nothing.
  void follow() {
    for (const quire::CacheEvent& event : manager_.take_events()) {
      REQUIRE(event.sequence == ++num_events_);
      if (event.kind == quire::CacheEventKind::kStored)
        REQUIRE(cached_.insert(event.block).second);
      else
        REQUIRE(cached_.erase(event.block) == 1);
    }
    if (num_events_ == 0) return;
    const std::vector<int32_t> cached = manager_.cached_blocks();
    REQUIRE(std::set(cached.begin(), cached.end()) == cached_);
  }

  SequenceId create(Tokens tokens, Salt salt = {}, quire::Retention retention = {}) {
    return attempt([&] { return manager_.create(tokens, salt, retention); });
  }
  SequenceId open(Tokens tokens, Salt salt) {
    return attempt([&] { return manager_.open(tokens, salt); });
  }
  void attach(SequenceId seq) {
    attempt([&] { manager_.attach(seq); });
  }
  void detach(SequenceId seq) {
    attempt([&] { manager_.detach(seq); });
  }
  const quire::StepBatch* step(Seqs seqs, Tokens counts, int32_t lookahead = 0) {
    const quire::StepBatch* const batch =
        attempt([&] { return manager_.step(seqs, counts, lookahead); });
    if (batch) list_changes();
    return batch;
  }
  void commit(Seqs seqs, Tokens sampled, Tokens num_sampled) {
    attempt([&] { manager_.commit(seqs, sampled, num_sampled); });
  }
  SequenceId fork(SequenceId seq) {
    return attempt([&] { return manager_.fork(seq); });
  }
  void fork(SequenceId seq, std::span<SequenceId> children) {
    attempt([&] { manager_.fork(seq, children); });
  }
  void truncate(SequenceId seq, int64_t num_tokens) {
    attempt([&] { manager_.truncate(seq, num_tokens); });
  }
  void free(Seqs seqs) {
    attempt([&] { manager_.free(seqs); });
  }
  void retire(int64_t ticket) {
    attempt([&] { manager_.retire(ticket); });
  }
  // A sequence, or tokens and salt.
  template <class... What>
  int64_t pin(const What&... what) {
    return attempt([&] { return manager_.pin(what...); });
  }
  template <class... What>
  int64_t unpin(const What&... what) {
    return attempt([&] { return manager_.unpin(what...); });
  }
  int32_t clear_cache() {
    return attempt([&] { return manager_.clear_cache(); });
  }
  auto swap_out(SequenceId seq) {
    return attempt([&] { return manager_.swap_out(seq); });
  }
  auto swap_in(SequenceId seq) {
    return attempt([&] { return manager_.swap_in(seq); });
  }

 private:
  // Of the latest step, for which it has taken the memory: no allocation works meanwhile.
  void list_changes() {
    allocations_left = 0;
    for (int32_t group = 0; group < manager_.num_groups(); ++group) manager_.batch(group).changes();
    allocations_left = -1;
  }

  quire::KVCacheManager& manager_;
  std::vector<quire::KVTransfer> offloads_;
  int64_t num_events_ = 0;
  std::set<int32_t> cached_;  // as the events tell
};

}  // namespace out_of_memory
