// SPDX-License-Identifier: Apache-2.0
// Layer groups: layers of one model that keep different parts of the KV.
//
// Every group has blocks of its own for the same tokens, out of one pool. Group 0 is full
// attention; the prefix cache's tree consists of its blocks. A cached block of another group is
// the companion of the block of group 0 that ends with the same token. It may be evicted before
// that block, never outlives it, and nobody holds it without holding that block.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace quire {

// What the layers of a group read, of a sequence whose next token is at position p.
struct LayerGroup {
  enum class Kind : uint8_t {
    kFull,           // every token before
    kSlidingWindow,  // the last `size` tokens, that at p included
    kChunkedLocal,   // tokens from p / size * size on
    kState,          // one block that sums up all tokens before, as of Mamba
  };
  Kind kind = Kind::kFull;
  int32_t size = 0;  // tokens; of windows and chunks only
};

// The rules of a model's groups, and which cached block is whose companion.
// 8 bytes a block and 4 more for each group but the first.
class CompanionCache {
 public:
  static constexpr int32_t kNone = -1;

  // Two groups or more, the first of them full. Throws InvalidArgument naming the wrong one.
  CompanionCache(std::vector<LayerGroup> groups, int32_t num_blocks, int32_t block_size);

  int32_t num_groups() const { return static_cast<int32_t>(groups_.size()); }
  const LayerGroup& group(int32_t group) const { return groups_[group]; }
  bool is_state(int32_t group) const { return groups_[group].kind == LayerGroup::Kind::kState; }

  // The first block whose tokens a group reads, or writes, once num_tokens are computed. Of a
  // state group the block that ends with them.
  int32_t first_needed(int32_t group, int64_t num_tokens) const;

  // At most so many blocks does a group hold to compute num_tokens tokens, at most max_step a step.
  int64_t most_blocks(int32_t group, int64_t num_tokens, int64_t max_step) const;

  // How many of the leading whole blocks of `path` a sequence can begin with: the most for which
  // every group has what it needs. Not for two threads at once.
  size_t usable_blocks(std::span<const int32_t> path) const;

  int32_t find(int32_t group, int32_t node) const { return companions_[group - 1][node]; }
  bool contains(int32_t block) const { return owners_[block].node != kNone; }
  int32_t node_of(int32_t block) const { return owners_[block].node; }
  int32_t group_of(int32_t block) const { return owners_[block].group; }
  void insert(int32_t group, int32_t node, int32_t block);
  void erase(int32_t block);
  // Some companion of a node; kNone where it has none.
  int32_t any_of(int32_t node) const;

  int32_t size() const { return size_; }
  int64_t num_bytes() const;

  // Walks everything; throws InvariantError.
  void validate() const;

 private:
  struct Owner {
    int32_t node = kNone;
    int32_t group = 0;
  };

  std::vector<LayerGroup> groups_;
  int32_t block_size_;
  int32_t size_ = 0;
  std::vector<std::vector<int32_t>> companions_;  // [groups - 1][num_blocks], by node
  std::vector<Owner> owners_;                     // [num_blocks]
  mutable std::vector<int32_t> runs_;  // scratch: of companions that end with a block, by group
};

}  // namespace quire
