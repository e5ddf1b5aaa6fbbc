// SPDX-License-Identifier: Apache-2.0
// PrefixCache: which block already holds the KV of given tokens after a given prefix.
//
// A tree whose nodes are the cached blocks themselves: node = block id, so there is nothing to
// allocate. A block stands for its own tokens after its parent's, up to the root of a namespace.
// Children are found by a hash and then compared token by token: a collision costs time, never
// correctness. Per block 16 bytes of links, 4 to 8 of hash table, and 4 bytes a token.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace quire {

using Salt = std::optional<std::string_view>;  // sequences of different salts share nothing

class PrefixCache {
 public:
  static constexpr int32_t kNone = INT32_MIN;  // no block, no root

  PrefixCache(int32_t num_blocks, int32_t block_size);

  // The root of a salt's tree (a negative number). open_root() makes it if need be and holds it
  // until close_root(); find_root() returns kNone where nobody holds it and nothing is cached.
  int32_t open_root(Salt salt);
  void hold_root(int32_t root) { ++root_of(root).num_holders; }  // one that is held already
  void close_root(int32_t root);
  int32_t find_root(Salt salt) const;

  // The child of `parent` (a cached block or a root) that holds these block_size tokens, or kNone.
  int32_t find(int32_t parent, const int32_t* tokens) const;

  // Caches `block`, which holds these block_size tokens, under `parent`. Returns `block`, or the
  // block that holds them there already; then nothing changes.
  int32_t insert(int32_t parent, const int32_t* tokens, int32_t block);

  // Forgets a block. It must have no children: they would be left without their prefix.
  void erase(int32_t block);

  bool contains(int32_t block) const { return parent_[block] != kNone; }
  int32_t parent(int32_t block) const { return parent_[block]; }  // kNone: not cached
  const int32_t* tokens(int32_t block) const { return &tokens_[int64_t{block} * block_size_]; }
  int32_t size() const { return size_; }

  // Walks everything; throws InvariantError.
  void validate() const;

 private:
  struct Root {
    std::optional<std::string> salt;
    int64_t num_holders = 0;  // by open_root()
    int64_t num_children = 0;
    int32_t newest_child = kNone;
  };
  Root& root_of(int32_t root) { return roots_[-1 - root]; }
  const Root& root_of(int32_t root) const { return roots_[-1 - root]; }
  int32_t newest_child(int32_t parent) const;
  void add_child(int32_t parent, int32_t child);
  void remove_child(int32_t parent, int32_t child);
  void drop_root_if_idle(int32_t root);
  int32_t& bucket_of(int32_t parent, const int32_t* tokens);
  const int32_t& bucket_of(int32_t parent, const int32_t* tokens) const;
  int32_t find_from(int32_t first, int32_t parent, const int32_t* tokens) const;
  bool holds(int32_t block, int32_t parent, const int32_t* tokens) const;

  int32_t block_size_;
  int32_t size_ = 0;
  uint64_t seed_;                      // so that nobody can choose tokens that collide
  std::vector<int32_t> parent_;        // kNone: not cached
  std::vector<int32_t> num_children_;  // eviction goes from the leaves
  std::vector<int32_t> newest_child_;  // tried first: most blocks have one child
  std::vector<int32_t> next_;          // in the same bucket
  std::vector<int32_t> buckets_;       // [power of two] the first block of each
  std::unique_ptr<int32_t[]> tokens_;  // [num_blocks, block_size], touched only where cached
  std::vector<Root> roots_;
  std::vector<int32_t> idle_roots_;
  std::unordered_map<std::string, int32_t> roots_by_salt_;
};

}  // namespace quire
