// SPDX-License-Identifier: Apache-2.0
// What the C interfaces of the manager and of the scheduler share.
#pragma once

#include "c_api/convert.h"
#include "quire/kv_cache_manager.h"

struct QuireKVCacheManager {
  quire::KVCacheManager manager;
};

namespace quire::c {

QuireStepBatch as_c(const StepBatch& batch);

}  // namespace quire::c
