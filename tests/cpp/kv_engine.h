// SPDX-License-Identifier: Apache-2.0
// A toy engine whose KV of a token is the token itself: whatever a sequence's slots hold must read
// back as its tokens.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "quire/kv_cache_manager.h"

namespace kv_engine {

using quire::KVCacheManager;
using quire::SequenceId;
using quire::StepBatch;
using Ids = std::vector<int32_t>;

inline Ids range(int32_t first, int32_t count) {
  Ids tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

struct Engine {
  KVCacheManager manager;
  std::vector<int32_t> kv;  // [num_blocks * block_size] a token each

  Engine(int32_t num_blocks, int32_t block_size, bool prefix_caching = true, int32_t depth = 0)
      : manager(num_blocks, block_size, prefix_caching, depth),
        kv(size_t(num_blocks) * block_size, -1) {}

  Ids blocks(SequenceId seq) const { return manager.block_table(seq); }

  // What the model's append_kv and copy_blocks would do.
  void write(const StepBatch& batch, const std::vector<SequenceId>& seqs) {
    const int32_t size = manager.allocator().block_size();
    for (size_t i = 0; i < batch.copies().size(); i += 2)
      std::copy_n(&kv[int64_t{batch.copies()[i]} * size], size,
                  &kv[int64_t{batch.copies()[i + 1]} * size]);
    for (size_t i = 0; i < seqs.size(); ++i) {
      const auto pending = manager.pending_tokens(seqs[i]);
      const int64_t computed = manager.num_computed_tokens(seqs[i]);
      for (int32_t t = batch.cu_seqlens_q()[i]; t < batch.cu_seqlens_q()[i + 1]; ++t)
        kv[batch.slot_mapping()[t]] = pending[batch.positions()[t] - computed];
    }
  }

  bool step(const std::vector<SequenceId>& seqs, const Ids& counts) {
    const StepBatch* batch = manager.step(seqs, counts);
    if (batch) write(*batch, seqs);
    manager.validate();
    return batch != nullptr;
  }

  void commit(const std::vector<SequenceId>& seqs, const Ids& sampled = {}) {
    manager.commit(seqs, sampled);
    for (SequenceId seq : seqs) check(seq);
  }

  // Computes all known tokens, then appends `sampled`.
  void run(SequenceId seq, const Ids& sampled = {}) {
    const auto left = manager.num_tokens(seq) - manager.num_computed_tokens(seq);
    REQUIRE(step({seq}, {static_cast<int32_t>(left)}));
    manager.commit({&seq, 1}, sampled, Ids{static_cast<int32_t>(sampled.size())});
    check(seq);
  }

  SequenceId start(const Ids& prompt, quire::Salt salt = {}) {
    const SequenceId seq = manager.create(prompt, salt);
    run(seq);
    return seq;
  }

  void free(SequenceId seq) {
    manager.free({&seq, 1});
    manager.validate();
  }

  void check(SequenceId seq) const {
    manager.validate();
    const int32_t size = manager.allocator().block_size();
    const Ids ids = blocks(seq), tokens = manager.tokens(seq);
    for (int64_t t = 0; t < manager.num_computed_tokens(seq); ++t)
      REQUIRE(kv[int64_t{ids[t / size]} * size + t % size] == tokens[t]);
  }
};

}  // namespace kv_engine
