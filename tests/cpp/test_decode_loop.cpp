// SPDX-License-Identifier: Apache-2.0
// Steps of the DecodeLoop beside the same steps of a manager that leaves the loop after each.
#include <doctest/doctest.h>

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "quire/kv_cache_manager.h"

using quire::KVCacheManager;
using quire::SequenceId;
using quire::StepBatch;
using Ids = std::vector<int32_t>;

namespace {

template <class Array>
auto list(const Array& array) {
  return std::vector(array.begin(), array.end());
}

std::set<std::pair<int32_t, int32_t>> changes_of(const StepBatch& batch) {
  std::set<std::pair<int32_t, int32_t>> changes;
  for (size_t i = 0; i < batch.changes().size(); i += 2)
    changes.emplace(batch.changes()[i], batch.changes()[i + 1]);
  return changes;
}

struct Decoder {
  KVCacheManager manager;
  std::vector<SequenceId> seqs;

  // Sequences of 1, 2, ... tokens; of two with as many tokens both are equal.
  Decoder(int32_t block_size, int32_t count, bool prefix_caching)
      : manager(4096 / block_size * count, block_size, prefix_caching) {
    Ids counts;
    for (int32_t i = 0; i < count; ++i) {
      counts.push_back(1 + i / 2);
      seqs.push_back(manager.create(Ids(counts.back(), 7)));
    }
    // The second of two equal ones may find the first one's tokens cached only once those are.
    manager.step(seqs, counts);
    manager.commit(seqs, Ids(seqs.size(), 1));
  }

  const StepBatch& step() { return *manager.step(seqs, Ids(seqs.size(), 1)); }
};

void check_same(const Decoder& a, const Decoder& b) {
  for (size_t i = 0; i < a.seqs.size(); ++i) {
    CHECK(a.manager.block_table(a.seqs[i]) == b.manager.block_table(b.seqs[i]));
    CHECK(a.manager.tokens(a.seqs[i]) == b.manager.tokens(b.seqs[i]));
  }
}

// Any number of steps, so that the loop ends at any time after any number of filled blocks.
void decode(int32_t block_size, int32_t num_steps, bool prefix_caching) {
  Decoder loop(block_size, 9, prefix_caching), plain(block_size, 9, prefix_caching);
  for (int32_t time = 0; time < num_steps; ++time) {
    const StepBatch &a = loop.step(), &b = plain.step();
    CHECK(list(a.slot_mapping()) == list(b.slot_mapping()));
    CHECK(list(a.positions()) == list(b.positions()));
    CHECK(list(a.seq_lens()) == list(b.seq_lens()));
    CHECK(a.max_blocks() == b.max_blocks());
    CHECK(changes_of(a) == changes_of(b));
    CHECK(loop.manager.stats().used_tokens == plain.manager.stats().used_tokens);
    Ids sampled(loop.seqs.size());
    for (size_t i = 0; i < sampled.size(); ++i) sampled[i] = time * 100 + int32_t(i / 2 % 3);
    loop.manager.commit(loop.seqs, sampled);
    plain.manager.commit(plain.seqs, sampled);
    plain.manager.tokens(plain.seqs[0]);
    CHECK(loop.manager.stats().used_tokens == plain.manager.stats().used_tokens);
  }
  check_same(loop, plain);
  loop.manager.validate();
  loop.step();
  plain.step();
  check_same(loop, plain);
  loop.manager.validate();
}

}  // namespace

TEST_CASE("a decode loop does what its steps would do one by one") {
  for (bool prefix_caching : {true, false})
    for (int32_t block_size : {1, 3, 16, 100})
      for (int32_t num_steps : {1, 15, 16, 17, 40, 150, 333})
        decode(block_size, num_steps, prefix_caching);
}
