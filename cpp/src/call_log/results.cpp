// SPDX-License-Identifier: Apache-2.0
#include "call_log/results.h"

#include <array>
#include <bit>
#include <cstring>

#include "quire/error.h"

namespace quire::call_log {
namespace {

void add_counts(const KVCacheManager& manager, ResultCheck& check) {
  const KVCacheStats stats = manager.stats();
  const std::array<int32_t, 3> counts = {stats.free_blocks, stats.used_blocks, stats.cached_blocks};
  check.add(counts);
}

void add_tables(const KVCacheManager& manager, SequenceId seq, ResultCheck& check) {
  for (int32_t group = 0; group < manager.num_groups(); ++group)
    check.add(manager.block_table(seq, group));
}

template <class T>
std::span<const T> span_of(const StepArray<T>& array) {
  return {array.data(), array.size()};
}

}  // namespace

uint32_t check_counts(const KVCacheManager& manager) { return check_free(manager, {}); }

uint32_t check_born(const KVCacheManager& manager, std::span<const SequenceId> seqs) {
  ResultCheck check;
  add_counts(manager, check);
  for (SequenceId seq : seqs) {
    const int64_t num_cached = manager.num_cached_tokens(seq);
    check.add(std::span(&num_cached, 1));
    add_tables(manager, seq, check);
  }
  return check.value();
}

uint32_t check_number(const KVCacheManager& manager, int64_t number) {
  ResultCheck check;
  add_counts(manager, check);
  check.add(std::span(&number, 1));
  return check.value();
}

std::vector<int32_t> key_heads(std::span<const KVTransfer> loads) {
  std::vector<int32_t> heads(2 * loads.size());
  for (size_t i = 0; i < loads.size(); ++i)
    std::memcpy(&heads[2 * i], loads[i].key.bytes.data(), 2 * sizeof heads[0]);
  return heads;
}

std::vector<int32_t> numbers_of(const Retention& retention) {
  const Retention usual;
  if (retention.priority == usual.priority && retention.ttl == usual.ttl) return {};
  const auto ttl = std::bit_cast<std::array<int32_t, 2>>(retention.ttl);
  return {retention.priority, ttl[0], ttl[1]};
}

Retention retention_of(std::span<const int32_t> numbers) {
  if (numbers.size() != 3) return {};
  return {numbers[0], std::bit_cast<double>(std::array{numbers[1], numbers[2]})};
}

uint32_t check_step(const KVCacheManager& manager, std::span<const SequenceId> seqs,
                    const StepBatch* batch) {
  ResultCheck check;
  add_counts(manager, check);
  if (!batch) return check.value();
  check.add(span_of(batch->slot_mapping()));
  check.add(span_of(batch->seq_lens()));
  check.add(span_of(batch->copies()));
  for (int32_t group = 1; group < manager.num_groups(); ++group) {
    check.add(span_of(manager.batch(group).copies()));
    for (SequenceId seq : seqs) check.add(manager.block_table(seq, group));
  }
  return check.value();
}

ResultCheck tables_of(const KVCacheManager& manager, std::span<const SequenceId> seqs) {
  ResultCheck check;
  for (SequenceId seq : seqs) {
    try {
      add_tables(manager, seq, check);
    } catch (const InvalidArgument&) {
    }
  }
  return check;
}

uint32_t check_free(const KVCacheManager& manager, ResultCheck tables) {
  add_counts(manager, tables);
  return tables.value();
}

uint32_t check_loads(const KVCacheManager& manager,
                     const std::optional<std::vector<KVTransfer>>& loads) {
  ResultCheck check;
  add_counts(manager, check);
  if (!loads) return check.value();
  for (const KVTransfer& load : *loads) check.add(std::span(&load.block, 1));
  for (const KVTransfer& load : *loads) {
    std::array<int32_t, sizeof load.key.bytes / sizeof(int32_t)> key;
    std::memcpy(key.data(), load.key.bytes.data(), sizeof key);
    check.add(key);
  }
  return check.value();
}

uint32_t check_pairs(const KVCacheManager& manager,
                     const std::optional<KVCacheManager::BlockPairs>& pairs) {
  ResultCheck check;
  add_counts(manager, check);
  if (!pairs) return check.value();
  for (const auto& pair : *pairs) check.add(pair);
  return check.value();
}

}  // namespace quire::call_log
