// SPDX-License-Identifier: Apache-2.0
// The results of calls, reduced as ResultCheck says; recorder and replay share this.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "quire/call_log.h"

namespace quire::call_log {

uint32_t check_counts(const KVCacheManager& manager);
uint32_t check_born(const KVCacheManager& manager, std::span<const SequenceId> seqs);
uint32_t check_number(const KVCacheManager& manager, int64_t number);
// Null: out of blocks, as below.
uint32_t check_step(const KVCacheManager& manager, std::span<const SequenceId> seqs,
                    const StepBatch* batch);
uint32_t check_loads(const KVCacheManager& manager,
                     const std::optional<std::vector<KVTransfer>>& loads);
uint32_t check_pairs(const KVCacheManager& manager,
                     const std::optional<KVCacheManager::BlockPairs>& pairs);

// How a call names what fetch() gave and how long blocks are kept: LoggedCall::counts.
std::vector<int32_t> key_heads(std::span<const KVTransfer> loads);
std::vector<int32_t> numbers_of(const Retention& retention);
Retention retention_of(std::span<const int32_t> numbers);

// The tables of sequences that are about to be freed; those not alive have none. check_free() adds
// the counts after the call.
ResultCheck tables_of(const KVCacheManager& manager, std::span<const SequenceId> seqs);
uint32_t check_free(const KVCacheManager& manager, ResultCheck tables);

}  // namespace quire::call_log
