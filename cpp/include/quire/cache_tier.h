// SPDX-License-Identifier: Apache-2.0
// Where the contents of a block can lie, and what has to be copied from place to place.
#pragma once

#include <cstdint>

#include "quire/chain_key.h"

namespace quire {

enum class CacheTier : uint8_t { kDevice, kHost, kFile };

// One block of the pool that a store is to get, or is to fill.
struct KVTransfer {
  int32_t block = -1;
  CacheTier tier = CacheTier::kHost;  // of the store; of an offload that of the nearest one
  ChainKey key;
};

}  // namespace quire
