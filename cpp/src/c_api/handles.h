// SPDX-License-Identifier: Apache-2.0
// What the C interfaces of the manager and of the scheduler share.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "c_api/convert.h"
#include "quire/kv_cache_manager.h"

struct QuireKVCacheManager {
  quire::KVCacheManager manager;

  // The rest is touched under the manager's lock only.
  std::vector<std::unique_lock<quire::PriorityMutex>> locks{};  // of the thread that holds it
  std::vector<quire::CacheEvent> events{};  // taken from the manager, not yet by the caller
  std::vector<QuireKVTransfer> offloads{};  // what the caller took last
};

namespace quire::c {

struct Prompt {
  std::span<const int32_t> tokens;
  Salt salt;
  Retention retention;
};

Prompt as_prompt(const char* argument, const QuirePrompt* prompt);

inline SequenceId as_id(QuireSequenceId seq) { return {seq.value}; }

// Nothing can fail once a step is done.
QuireStepBatch as_c(const StepBatch& batch) noexcept;

}  // namespace quire::c
