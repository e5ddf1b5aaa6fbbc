// SPDX-License-Identifier: Apache-2.0
// A tree over block ids; the siblings of each level are a treap over the same ids.
#include "quire/prefix_cache.h"

#include <algorithm>
#include <random>
#include <utility>

#include "packed_tokens.h"
#include "quire/error.h"

namespace quire {
namespace {

constexpr int32_t kUnsaltedRoot = -1;  // never dropped

}  // namespace

PrefixCache::PrefixCache(int32_t num_blocks, int32_t block_size)
    : block_size_(block_size), num_blocks_(num_blocks), row_bytes_(packed_bytes(block_size)) {
  static_assert(sizeof(Node) == 16);
  seed_ = std::random_device{}();
  nodes_.assign(static_cast<size_t>(num_blocks), Node{});
  // Written once here, so that no step waits for the system to find the memory.
  rows_ = std::make_unique<uint8_t[]>(static_cast<size_t>(num_blocks * row_bytes_));
  roots_.emplace_back();
}

// ---- Roots

int32_t PrefixCache::find_root(Salt salt) const {
  if (!salt) return kUnsaltedRoot;
  const auto found = roots_by_salt_.find(std::string(*salt));
  return found == roots_by_salt_.end() ? kNone : found->second;
}

int32_t PrefixCache::open_root(Salt salt) {
  int32_t root = find_root(salt);
  if (root == kNone) {
    if (idle_roots_.empty()) {
      roots_.emplace_back();
      idle_roots_.push_back(-static_cast<int32_t>(roots_.size()));
    }
    root = idle_roots_.back();
    idle_roots_.pop_back();
    root_of(root).salt = std::string(*salt);
    roots_by_salt_[std::string(*salt)] = root;
  }
  ++root_of(root).num_holders;
  return root;
}

void PrefixCache::close_root(int32_t root) {
  --root_of(root).num_holders;
  drop_root_if_idle(root);
}

void PrefixCache::drop_root_if_idle(int32_t root) {
  Root& entry = root_of(root);
  if (root == kUnsaltedRoot || entry.num_holders > 0 || entry.child != kNil) return;
  roots_by_salt_.erase(*entry.salt);
  entry = Root{};
  idle_roots_.push_back(root);
}

int32_t PrefixCache::parent(int32_t block) const {
  const Node& node = nodes_[block];
  if (!node.is_cached) return kNone;
  const int32_t index = static_cast<int32_t>(node.parent);
  return node.has_root_parent ? -1 - index : index;
}

// ---- Tokens of a node

int32_t PrefixCache::equal_prefix(uint32_t node, Key key) const {
  const int32_t count = std::min(key.count, num_tokens(static_cast<int32_t>(node)));
  if (nodes_[node].is_wide) {
    const int32_t* row = wide_rows_.at(static_cast<int32_t>(node)).data();
    return static_cast<int32_t>(std::mismatch(row, row + count, key.tokens).first - row);
  }
  return PackedRow(&rows_[node * row_bytes_], block_size_).equal_prefix(key.tokens, count);
}

int32_t PrefixCache::token(uint32_t node, int32_t i) const {
  if (nodes_[node].is_wide) return wide_rows_.at(static_cast<int32_t>(node))[i];
  return PackedRow(&rows_[node * row_bytes_], block_size_)[i];
}

// Whether a node comes before the key, given how many of their tokens are equal. Of two, one the
// beginning of the other, the shorter comes first.
bool PrefixCache::is_before(uint32_t node, Key key, int32_t num_equal) const {
  if (num_equal == key.count) return false;
  if (num_equal == num_tokens(static_cast<int32_t>(node))) return true;
  return token(node, num_equal) < key.tokens[num_equal];
}

// Writes a block's tokens, and to its node where they lie.
void PrefixCache::store(int32_t block, Key key, Node* node) {
  node->is_partial = key.count < block_size_;
  node->child = node->is_partial ? static_cast<uint32_t>(key.count) : kNil;
  node->is_wide = !fits_packed(key.tokens, key.count);
  if (node->is_wide) {
    wide_rows_[block].assign(key.tokens, key.tokens + key.count);
    return;
  }
  uint8_t* row = &rows_[block * row_bytes_];
  if (!node->is_partial) return PackedRow::pack(key.tokens, block_size_, row);
  std::vector<int32_t> padded(key.tokens, key.tokens + key.count);
  padded.resize(std::min<size_t>(block_size_, key.count + kPackedRun - 1));
  if (padded.size() < static_cast<size_t>(block_size_))
    padded.resize(padded.size() / kPackedRun * kPackedRun);  // whole runs
  PackedRow::pack(padded.data(), static_cast<int32_t>(padded.size()), row);
}

std::vector<int32_t> PrefixCache::tokens(int32_t block) const {
  std::vector<int32_t> result(num_tokens(block));
  for (size_t i = 0; i < result.size(); ++i)
    result[i] = token(static_cast<uint32_t>(block), static_cast<int32_t>(i));
  return result;
}

// ---- Treaps

// Random, and the same each time: a hash of the id.
uint32_t PrefixCache::priority(uint32_t node) const {
  uint32_t hash = (node ^ seed_) * 0x9e3779b1u;  // 2^32 / golden ratio
  hash = (hash ^ hash >> 15) * 0x85ebca77u;
  return hash ^ hash >> 13;
}

// Puts a block, whose node has no neighbours yet, into a treap.
uint32_t PrefixCache::put(uint32_t node, uint32_t block, Key key) {
  if (node == kNil) return block;
  if (priority(block) > priority(node)) {
    uint32_t before, behind;
    split(node, key, &before, &behind);
    nodes_[block].left = before;
    nodes_[block].right = behind;
    return block;
  }
  if (is_before(node, key, equal_prefix(node, key)))
    nodes_[node].right = put(nodes_[node].right, block, key);
  else
    nodes_[node].left = put(nodes_[node].left, block, key);
  return node;
}

void PrefixCache::split(uint32_t node, Key key, uint32_t* before, uint32_t* behind) {
  if (node == kNil) {
    *before = *behind = kNil;
    return;
  }
  uint32_t inner;
  if (is_before(node, key, equal_prefix(node, key))) {
    split(nodes_[node].right, key, &inner, behind);
    nodes_[node].right = inner;
    *before = node;
  } else {
    split(nodes_[node].left, key, before, &inner);
    nodes_[node].left = inner;
    *behind = node;
  }
}

uint32_t PrefixCache::merge(uint32_t before, uint32_t behind) {
  if (before == kNil) return behind;
  if (behind == kNil) return before;
  if (priority(before) > priority(behind)) {
    nodes_[before].right = merge(nodes_[before].right, behind);
    return before;
  }
  nodes_[behind].left = merge(before, nodes_[behind].left);
  return behind;
}

uint32_t PrefixCache::take_out(uint32_t node, uint32_t block, Key key) {
  if (node == block) return merge(nodes_[node].left, nodes_[node].right);
  if (is_before(node, key, equal_prefix(node, key)))
    nodes_[node].right = take_out(nodes_[node].right, block, key);
  else
    nodes_[node].left = take_out(nodes_[node].left, block, key);
  return node;
}

// ---- The tree

PrefixCache::Match PrefixCache::find(int32_t parent, const int32_t* tokens, int32_t count) const {
  const Key key{tokens, count};
  Match before, behind;  // the neighbours of the key in the order of siblings
  for (uint32_t node = top_child(parent); node != kNil;) {
    const Match match{static_cast<int32_t>(node), equal_prefix(node, key)};
    if (match.num_tokens == block_size_) return match;
    if (is_before(node, key, match.num_tokens)) {
      before = match;
      node = nodes_[node].right;
    } else {
      behind = match;
      node = nodes_[node].left;
    }
  }
  const Match best = before.num_tokens >= behind.num_tokens ? before : behind;
  return best.num_tokens == 0 ? Match{} : best;
}

int64_t PrefixCache::find_path(int32_t root, const int32_t* tokens, int64_t count,
                               std::vector<int32_t>* blocks) const {
  blocks->resize(static_cast<size_t>(count / block_size_) + 1);
  int32_t* out = blocks->data();
  int64_t num_found = 0;
  uint32_t top = top_child(root);
  for (int32_t parent = root; num_found < count; num_found += block_size_) {
    const int32_t size = static_cast<int32_t>(std::min<int64_t>(count - num_found, block_size_));
    // Most nodes have one child, and most of those are what is looked for.
    const bool is_plain = top != kNil && !nodes_[top].is_wide && !nodes_[top].is_partial;
    if (is_plain && size == block_size_ &&
        PackedRow(&rows_[top * row_bytes_], size).equal_prefix(tokens + num_found, size) == size) {
      parent = static_cast<int32_t>(top);
    } else {
      const Match found = find(parent, tokens + num_found, size);
      if (found.num_tokens < block_size_) {
        if (found.num_tokens > 0) *out++ = found.block;
        num_found += found.num_tokens;
        break;
      }
      parent = found.block;
    }
    *out++ = parent;
    top = nodes_[parent].child;
  }
  blocks->resize(static_cast<size_t>(out - blocks->data()));
  return num_found;
}

int32_t PrefixCache::insert(int32_t parent, const int32_t* tokens, int32_t count, int32_t block) {
  const uint32_t top = top_child(parent);
  const Key key{tokens, count};
  if (top != kNil) {
    const Match found = find(parent, tokens, count);
    if (found.num_tokens == count) return found.block;
  }
  Node node{};
  node.left = node.right = kNil;
  node.is_cached = 1;
  node.has_root_parent = parent < 0;
  node.parent = static_cast<uint32_t>(parent < 0 ? -1 - parent : parent);
  store(block, key, &node);
  nodes_[block] = node;
  set_top_child(parent, put(top, static_cast<uint32_t>(block), key));
  ++size_;
  return block;
}

void PrefixCache::erase(int32_t block) {
  QUIRE_INVARIANT(contains(block), "block ", block, ": evicted, but not cached");
  QUIRE_INVARIANT(!has_children(block), "block ", block, ": evicted before its children");
  const int32_t parent = this->parent(block);
  const uint32_t node = static_cast<uint32_t>(block), top = top_child(parent);
  if (top == node) {
    set_top_child(parent, merge(nodes_[node].left, nodes_[node].right));
  } else {
    const std::vector<int32_t> own = tokens(block);
    set_top_child(parent, take_out(top, node, {own.data(), static_cast<int32_t>(own.size())}));
  }
  if (nodes_[node].is_wide) wide_rows_.erase(block);
  nodes_[node] = Node{};
  --size_;
  if (parent < 0) drop_root_if_idle(parent);
}

int64_t PrefixCache::num_bytes() const {
  return static_cast<int64_t>(nodes_.size() * sizeof(Node)) + num_blocks_ * row_bytes_;
}

// ---- validate()

// Counts the nodes of a treap; each must be found, and outrank its own two.
void PrefixCache::check_treap(uint32_t top, int32_t parent, int32_t* count) const {
  if (top == kNil) return;
  const int32_t block = static_cast<int32_t>(top);
  QUIRE_INVARIANT(contains(block), "block ", block, ": a child that is not cached");
  QUIRE_INVARIANT(this->parent(block) == parent, "block ", block, ": child of another");
  QUIRE_INVARIANT(++*count <= size_, "a treap runs in circles");
  const std::vector<int32_t> own = tokens(block);
  const Match found = find(parent, own.data(), static_cast<int32_t>(own.size()));
  QUIRE_INVARIANT(found.num_tokens == static_cast<int32_t>(own.size()), "block ", block,
                  ": not found");
  QUIRE_INVARIANT(found.block == block || nodes_[top].is_partial, "block ", block, ": twice");
  QUIRE_INVARIANT((nodes_[top].is_wide != 0) == (wide_rows_.count(block) != 0), "block ", block,
                  ": tokens in the wrong place");
  for (const uint32_t below : {uint32_t{nodes_[top].left}, uint32_t{nodes_[top].right}}) {
    QUIRE_INVARIANT(below == kNil || priority(below) <= priority(top), "block ", block,
                    ": outranked");
    check_treap(below, parent, count);
  }
}

void PrefixCache::validate() const {
  int32_t num_reached = 0, num_cached = 0;
  for (size_t i = 0; i < roots_.size(); ++i)
    check_treap(roots_[i].child, -1 - static_cast<int32_t>(i), &num_reached);
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (!contains(block)) continue;
    ++num_cached;
    check_treap(top_child(block), block, &num_reached);
  }
  QUIRE_INVARIANT(num_cached == size_ && num_reached == size_, "size is off");
  QUIRE_INVARIANT(roots_by_salt_.size() + idle_roots_.size() + 1 == roots_.size(),
                  "a root is neither in use nor idle");
}

}  // namespace quire
