// SPDX-License-Identifier: Apache-2.0
// BlockKeys: the chain keys of cached blocks, each computed when it is first asked for.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quire/chain_key.h"
#include "quire/prefix_cache.h"

namespace quire {

// 37 bytes a block. One SHA-256 a block, as its parent stays cached as long as it does itself.
// Nothing but the constructor asks for memory: keys are made while blocks enter and leave.
class BlockKeys {
 public:
  BlockKeys(int32_t num_blocks, int32_t block_size)
      : keys_(num_blocks), is_known_(num_blocks, 0), path_(num_blocks), tokens_(block_size) {}

  // Of a cached block, or of a root.
  ChainKey key(const PrefixCache& cache, int32_t block);

  // The key of a block that is cached from now on and holds these tokens.
  void admit(const PrefixCache& cache, int32_t block, std::span<const int32_t> tokens);

  void forget(int32_t block) { is_known_[block] = 0; }  // it leaves the cache

  int64_t num_bytes() const {
    return static_cast<int64_t>(keys_.size() *
                                (sizeof(ChainKey) + sizeof is_known_[0] + sizeof path_[0]));
  }

 private:
  std::vector<ChainKey> keys_;
  std::vector<uint8_t> is_known_;
  std::vector<int32_t> path_;    // scratch: blocks without a key, the last first,
  std::vector<int32_t> tokens_;  // and the tokens of one
};

}  // namespace quire
