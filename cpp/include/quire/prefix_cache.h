// SPDX-License-Identifier: Apache-2.0
// PrefixCache: which block already holds the KV of given tokens after a given prefix.
//
// A tree whose nodes are the cached blocks themselves: node = block id, so there is nothing to
// allocate. A block stands for its own tokens after its parent's, up to the root of a namespace.
// It holds block_size tokens, or fewer; then it has no children. Tokens are compared one by one:
// there is no hash and no collision.
//
// The children of a node are a treap (a search tree that random priorities keep shallow) in the
// order of their tokens. Tokens that share the longest beginning with given ones lie next to them
// in that order, so one descent finds the best child among any number of siblings.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace quire {

using Salt = std::optional<std::string_view>;  // sequences of different salts share nothing

// 16 bytes a block and 2.5 bytes a token. A block with a token id outside 0 ... 2^20 - 1 keeps its
// tokens once more, in full, in a map beside.
class PrefixCache {
 public:
  static constexpr int32_t kNone = INT32_MIN;  // no block, no root

  PrefixCache(int32_t num_blocks, int32_t block_size);

  // The root of a salt's tree (a negative number). open_root() makes it if need be and holds it
  // until close_root(); find_root() returns kNone where nobody holds it and nothing is cached.
  int32_t open_root(Salt salt);
  void hold_root(int32_t root, int64_t times = 1) {  // one that is held already
    root_of(root).num_holders += times;
  }
  void close_root(int32_t root);
  int32_t find_root(Salt salt) const;
  Salt salt(int32_t root) const { return root_of(root).salt; }  // of an open one

  // The child of `parent` (a cached block or a root) that begins with most of `count` tokens
  // (at most block_size), and how many those are. No block where not even one is equal. Of
  // several the nearest in the order of tokens, the one before it first.
  struct Match {
    int32_t block = kNone;
    int32_t num_tokens = 0;
  };
  Match find(int32_t parent, const int32_t* tokens, int32_t count) const;

  // The blocks of the longest cached prefix of `count` tokens, from a root on. The last of them may
  // begin with some of the remaining tokens only. Returns the length of that prefix in tokens.
  int64_t find_path(int32_t root, const int32_t* tokens, int64_t count,
                    std::vector<int32_t>* blocks) const;

  // Caches `block`, which holds these tokens, under `parent`. Returns `block`, or a child that
  // begins with all of them already; then nothing changes.
  int32_t insert(int32_t parent, const int32_t* tokens, int32_t count, int32_t block);

  // Caches whole blocks, each the child of the one before it, the first one of `parent`: a cached
  // block without children.
  void insert_chain(int32_t parent, const int32_t* tokens, std::span<const int32_t> blocks);

  // Asks for the memory that inserting these whole blocks takes. insert() and insert_chain() of
  // blocks so prepared do not throw; drop_reserved() gives back what was not needed.
  void reserve_for(const int32_t* tokens, int32_t num_blocks);
  void drop_reserved() { spare_wide_rows_.clear(); }

  // Forgets a block. It must have no children: they would be left without their prefix.
  void erase(int32_t block);

  bool contains(int32_t block) const { return nodes_[block].is_cached; }
  int32_t parent(int32_t block) const;  // kNone: not cached
  bool has_children(int32_t block) const { return any_child(block) != kNone; }
  int32_t any_child(int32_t block) const {
    return nodes_[block].is_partial || nodes_[block].child == kNil
               ? kNone
               : static_cast<int32_t>(nodes_[block].child);
  }
  // The same one whatever seed the treaps have.
  int32_t first_child(int32_t block) const {
    uint32_t child = nodes_[block].child;
    while (nodes_[child].left != kNil) child = nodes_[child].left;
    return static_cast<int32_t>(child);
  }
  // What a cached block holds.
  int32_t num_tokens(int32_t block) const {
    return nodes_[block].is_partial ? static_cast<int32_t>(nodes_[block].child) : block_size_;
  }
  std::vector<int32_t> tokens(int32_t block) const;
  void copy_tokens(int32_t block, int32_t* out) const;  // [num_tokens(block)]

  // Asks for the memory of a block that is about to be inserted; of one that is to be its parent or
  // to be erased. No matter whether there is such a block.
  void prefetch(int32_t block) const {
    prefetch_node(block);
    __builtin_prefetch(rows_.get() + block * row_bytes_, 1);
    __builtin_prefetch(rows_.get() + (block + 1) * row_bytes_ - 1, 1);
  }
  void prefetch_node(int32_t block) const { __builtin_prefetch(nodes_.data() + block, 1); }

  int32_t size() const { return size_; }
  int64_t num_bytes() const;  // of the arrays whose size depends on num_blocks

  // A root that open_root() made, of the unsalted tree or another.
  bool is_open(int32_t root) const {
    return root == -1 || (root < 0 && root >= -static_cast<int64_t>(roots_.size()) &&
                          root_of(root).salt.has_value());
  }
  std::vector<int32_t> parents_first() const;  // all cached blocks

  // Everything but who holds which root, as integers, and back into a new cache: for snapshots.
  // load() throws InvalidArgument.
  std::vector<int64_t> save() const;
  void load(std::span<const int64_t> numbers);

  // Walks everything; throws InvariantError.
  void validate() const;

 private:
  static constexpr uint32_t kNil = (1u << 28) - 1;

  struct Node {
    uint32_t left : 28, is_cached : 1, is_wide : 1, is_partial : 1, has_root_parent : 1;
    uint32_t right : 28, : 4;
    uint32_t child : 28, : 4;   // the top of the children's treap; of a partial block its tokens
    uint32_t parent : 28, : 4;  // a block, or the number of a root
  };
  struct Root {
    std::optional<std::string> salt;
    int64_t num_holders = 0;  // by open_root()
    uint32_t child = kNil;
  };
  struct Key {
    const int32_t* tokens;
    int32_t count;
  };

  Root& root_of(int32_t root) { return roots_[-1 - root]; }
  const Root& root_of(int32_t root) const { return roots_[-1 - root]; }
  void drop_root_if_idle(int32_t root);
  uint32_t top_child(int32_t parent) const {
    if (parent < 0) return root_of(parent).child;
    return nodes_[parent].is_partial ? kNil : nodes_[parent].child;
  }
  void set_top_child(int32_t parent, uint32_t child) {
    if (parent < 0)
      root_of(parent).child = child;
    else
      nodes_[parent].child = child;
  }

  template <class Size>
  int64_t descend(const int32_t* tokens, int64_t num_blocks, Size block_size, uint32_t* top,
                  int32_t* out) const;
  int32_t equal_prefix(uint32_t node, Key key) const;
  bool is_before(uint32_t node, Key key, int32_t num_equal) const;
  int32_t token(uint32_t node, int32_t i) const;
  void store(int32_t block, Key key, Node* node);
  void reserve_wide_rows(int32_t count);
  void write_node(int32_t parent, Key key, int32_t block);
  uint32_t priority(uint32_t node) const;
  uint32_t put(uint32_t node, uint32_t block, Key key);
  void split(uint32_t node, Key key, uint32_t* before, uint32_t* behind);
  uint32_t merge(uint32_t before, uint32_t behind);
  uint32_t take_out(uint32_t node, uint32_t block, Key key);
  void check_treap(uint32_t top, int32_t parent, int32_t* count) const;

  int32_t block_size_;
  int32_t num_blocks_;
  int32_t size_ = 0;
  int64_t row_bytes_;
  uint32_t seed_;  // so that nobody can choose an order that makes the treaps deep
  std::vector<Node> nodes_;
  std::unique_ptr<uint8_t[]> rows_;  // [num_blocks, row_bytes]
  using WideRows = std::unordered_map<int32_t, std::vector<int32_t>>;
  WideRows wide_rows_;
  std::vector<WideRows::node_type> spare_wide_rows_;  // of wide rows to come
  std::vector<Root> roots_;
  std::vector<int32_t> idle_roots_;
  std::unordered_map<std::string, int32_t> roots_by_salt_;
};

}  // namespace quire
