// SPDX-License-Identifier: Apache-2.0
// What the tests of the C interface of the KV runtime share.
#pragma once

#include <doctest/doctest.h>

#include <numeric>
#include <string>
#include <vector>

#include "quire/quire.h"

namespace c_kv_case {

using Ids = std::vector<int32_t>;

inline Ids range(int32_t first, int32_t count) {
  Ids tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

inline QuireKVCacheConfig config_of(int32_t num_blocks, int32_t block_size = 4) {
  QuireKVCacheConfig config = QUIRE_KV_CACHE_CONFIG_INIT;
  config.num_blocks = num_blocks;
  config.block_size = block_size;
  return config;
}

inline QuireKVCacheManager* make_manager(const QuireKVCacheConfig& config) {
  QuireKVCacheManager* manager = nullptr;
  REQUIRE_MESSAGE(quire_kv_cache_manager_new(&config, &manager) == QUIRE_OK, quire_last_error());
  return manager;
}

inline QuirePrompt prompt_of(const Ids& tokens) {
  QuirePrompt prompt = QUIRE_PROMPT_INIT;
  prompt.token_ids = tokens.data();
  prompt.num_tokens = tokens.size();
  return prompt;
}

inline QuireSequenceId create(QuireKVCacheManager* manager, const Ids& tokens) {
  const QuirePrompt prompt = prompt_of(tokens);
  QuireSequenceId seq;
  REQUIRE(quire_kv_cache_manager_create(manager, &prompt, &seq) == QUIRE_OK);
  return seq;
}

inline QuireSequenceInfo info_of(const QuireKVCacheManager* manager, QuireSequenceId seq) {
  QuireSequenceInfo info = QUIRE_SEQUENCE_INFO_INIT;
  REQUIRE(quire_kv_cache_manager_sequence(manager, seq, &info) == QUIRE_OK);
  return info;
}

inline QuireKVCacheStats stats_of(const QuireKVCacheManager* manager) {
  QuireKVCacheStats stats = QUIRE_KV_CACHE_STATS_INIT;
  REQUIRE(quire_kv_cache_manager_stats(manager, &stats) == QUIRE_OK);
  return stats;
}

// Plans all that is not computed yet.
inline QuireStepBatch step(QuireKVCacheManager* manager, QuireSequenceId seq) {
  const QuireSequenceInfo info = info_of(manager, seq);
  const auto count = static_cast<int32_t>(info.num_tokens - info.num_computed_tokens);
  QuireStepBatch batch = QUIRE_STEP_BATCH_INIT;
  REQUIRE(quire_kv_cache_manager_step(manager, &seq, &count, 1, &batch) == QUIRE_OK);
  return batch;
}

inline void commit(QuireKVCacheManager* manager, QuireSequenceId seq) {
  REQUIRE(quire_kv_cache_manager_commit(manager, &seq, 1, nullptr, nullptr) == QUIRE_OK);
}

inline void free(QuireKVCacheManager* manager, QuireSequenceId seq) {
  REQUIRE(quire_kv_cache_manager_free(manager, &seq, 1) == QUIRE_OK);
}

// Asks an array for its size, then for its elements.
template <class T, class Ask>
std::vector<T> ask_twice(Ask ask) {
  size_t size = 0;
  REQUIRE_MESSAGE(ask(static_cast<T*>(nullptr), &size) == QUIRE_OK, quire_last_error());
  std::vector<T> values(size + 1);
  REQUIRE_MESSAGE(ask(values.data(), &size) == QUIRE_OK, quire_last_error());
  values.resize(size);
  return values;
}

inline std::string error_of(QuireStatus status, QuireStatus expected = QUIRE_INVALID_ARGUMENT) {
  CHECK(status == expected);
  return quire_last_error();
}

}  // namespace c_kv_case
