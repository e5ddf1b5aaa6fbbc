// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kv_snapshot/json.h"
#include "quire/kv_cache_manager.h"

namespace quire {

struct KVCacheManager::Snapshot : snapshot::Object {};

}  // namespace quire
