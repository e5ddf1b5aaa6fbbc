// SPDX-License-Identifier: Apache-2.0
// A tree over block ids; the siblings of each level are a treap over the same ids.
#include "quire/prefix_cache.h"

#include <algorithm>
#include <random>
#include <type_traits>
#include <utility>

#include "packed_tokens.h"
#include "quire/error.h"
#include "reserve_more.h"

namespace quire {
namespace {

constexpr int32_t kUnsaltedRoot = -1;  // never dropped
constexpr size_t kPrefetched = 4;      // blocks ahead of the one that is inserted
constexpr size_t kLookedAhead = 40;    // of the one that is compared

// Behind the rows: room for the tokens of a block.
size_t scratch_offset(int32_t num_blocks, int64_t row_bytes) {
  constexpr size_t kSize = sizeof(int32_t);
  return (static_cast<size_t>(num_blocks * row_bytes) + kSize - 1) / kSize * kSize;
}

// Asks for memory that may not be there: then nothing happens.
void prefetch_at(const void* array, size_t offset) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(array) + offset;
  __builtin_prefetch(reinterpret_cast<const void*>(address));
}

}  // namespace

PrefixCache::PrefixCache(int32_t num_blocks, int32_t block_size)
    : block_size_(block_size), num_blocks_(num_blocks), row_bytes_(packed_bytes(block_size)) {
  static_assert(sizeof(Node) == 16);
  seed_ = std::random_device{}();
  nodes_.assign(static_cast<size_t>(num_blocks), Node{});
  // Written once here, so that no step waits for the system to find the memory.
  rows_ = std::make_unique<uint8_t[]>(scratch_offset(num_blocks, row_bytes_) +
                                      sizeof(int32_t) * static_cast<size_t>(block_size));
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
    std::string name(*salt);
    const bool is_new = idle_roots_.empty();
    if (is_new) {
      reserve_more(roots_, 1);
      idle_roots_.reserve(roots_.capacity());  // drop_root_if_idle() must not throw
    }
    root = is_new ? -1 - static_cast<int32_t>(roots_.size()) : idle_roots_.back();
    roots_by_salt_.emplace(name, root);
    if (is_new)
      roots_.emplace_back();
    else
      idle_roots_.pop_back();
    root_of(root).salt = std::move(name);
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
  uint8_t* const row = &rows_[block * row_bytes_];
  node->is_wide = !PackedRow::pack(key.tokens, key.count, block_size_, row);
  if (!node->is_wide) return;
  if (spare_wide_rows_.empty()) reserve_wide_rows(1);
  auto wide_row = std::move(spare_wide_rows_.back());
  spare_wide_rows_.pop_back();
  wide_row.key() = block;
  wide_row.mapped().assign(key.tokens, key.tokens + key.count);
  wide_rows_.insert(std::move(wide_row));
}

void PrefixCache::reserve_for(const int32_t* tokens, int32_t num_blocks) {
  if (fits_packed(tokens, num_blocks * block_size_)) return;
  for (int32_t i = 0; i < num_blocks; ++i)
    if (!fits_packed(tokens + i * int64_t{block_size_}, block_size_)) reserve_wide_rows(1);
}

void PrefixCache::reserve_wide_rows(int32_t count) {
  wide_rows_.reserve(wide_rows_.size() + spare_wide_rows_.size() + count);
  reserve_more(spare_wide_rows_, static_cast<size_t>(count));
  WideRows made;
  for (int32_t i = 0; i < count; ++i) made[i].reserve(block_size_);
  while (!made.empty()) spare_wide_rows_.push_back(made.extract(made.begin()));
}

std::vector<int32_t> PrefixCache::tokens(int32_t block) const {
  std::vector<int32_t> result(num_tokens(block));
  copy_tokens(block, result.data());
  return result;
}

void PrefixCache::copy_tokens(int32_t block, int32_t* out) const {
  for (int32_t i = 0; i < num_tokens(block); ++i) out[i] = token(static_cast<uint32_t>(block), i);
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

// Down the tree as long as a node's top child is a plain one that holds the next tokens, as most
// are (most nodes have one child). Returns how many blocks those are; `*top` is the child of the
// last.
template <class Size>
int64_t PrefixCache::descend(const int32_t* tokens, int64_t num_blocks, Size block_size,
                             uint32_t* top, int32_t* out) const {
  const Node* const nodes = nodes_.data();
  const size_t row_bytes = static_cast<size_t>(packed_bytes(block_size));
  uint32_t node = *top;
  int64_t i = 0;
  for (; i < num_blocks && node != kNil; ++i, tokens += block_size) {
    const uint8_t* const row = rows_.get() + node * row_bytes;
    // What is compared some blocks from now, if the path goes on from id to next id, as most do. No
    // load is waited for to know where that lies, as it is to know the next node.
    prefetch_at(nodes, (node + kLookedAhead) * sizeof(Node));
    prefetch_at(row, kLookedAhead * row_bytes);
    prefetch_at(tokens, kLookedAhead * sizeof(int32_t) * static_cast<size_t>(block_size));
    if (nodes[node].is_wide || nodes[node].is_partial) break;
    if (!PackedRow(row, block_size).equals(tokens)) break;
    out[i] = static_cast<int32_t>(node);
    node = nodes[node].child;
  }
  *top = node;
  return i;
}

int64_t PrefixCache::find_path(int32_t root, const int32_t* tokens, int64_t count,
                               std::vector<int32_t>* blocks) const {
  const int64_t num_whole = count / block_size_;
  blocks->resize(static_cast<size_t>(num_whole) + 1);
  int32_t* const out = blocks->data();
  int32_t parent = root;
  for (int64_t i = 0;; ++i) {
    uint32_t top = top_child(parent);
    const int64_t begin = i * block_size_;
    i += block_size_ == kPackedRun
             ? descend(tokens + begin, num_whole - i, std::integral_constant<int32_t, kPackedRun>(),
                       &top, out + i)
             : descend(tokens + begin, num_whole - i, block_size_, &top, out + i);
    if (i > 0) parent = out[i - 1];
    const int64_t end = i * block_size_;
    const int64_t left = std::min<int64_t>(count - end, block_size_);
    const Match found = left > 0 ? find(parent, tokens + end, static_cast<int32_t>(left)) : Match{};
    if (found.num_tokens > 0) out[i] = found.block;
    if (found.num_tokens < block_size_) {
      blocks->resize(static_cast<size_t>(i + (found.num_tokens > 0)));
      return end + found.num_tokens;
    }
    parent = found.block;
  }
}

int32_t PrefixCache::insert(int32_t parent, const int32_t* tokens, int32_t count, int32_t block) {
  const uint32_t top = top_child(parent);
  const Key key{tokens, count};
  if (top != kNil) {
    const Match found = find(parent, tokens, count);
    if (found.num_tokens == count) return found.block;
  }
  write_node(parent, key, block);
  const uint32_t node = static_cast<uint32_t>(block);
  set_top_child(parent, top == kNil ? node : put(top, node, key));
  ++size_;
  return block;
}

void PrefixCache::insert_chain(int32_t parent, const int32_t* tokens,
                               std::span<const int32_t> blocks) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int32_t block = blocks[i];
    if (i + kPrefetched < blocks.size()) prefetch(blocks[i + kPrefetched]);
    write_node(parent, {tokens, block_size_}, block);
    set_top_child(parent, static_cast<uint32_t>(block));
    tokens += block_size_;
    parent = block;
  }
  size_ += static_cast<int32_t>(blocks.size());
}

// A node without neighbours or children.
void PrefixCache::write_node(int32_t parent, Key key, int32_t block) {
  Node node{};
  node.left = node.right = kNil;
  node.is_cached = 1;
  node.has_root_parent = parent < 0;
  node.parent = static_cast<uint32_t>(parent < 0 ? -1 - parent : parent);
  store(block, key, &node);
  nodes_[block] = node;
}

void PrefixCache::erase(int32_t block) {
  QUIRE_INVARIANT(contains(block), "block ", block, ": evicted, but not cached");
  QUIRE_INVARIANT(!has_children(block), "block ", block, ": evicted before its children");
  const int32_t parent = this->parent(block);
  const uint32_t node = static_cast<uint32_t>(block), top = top_child(parent);
  const uint32_t left = nodes_[node].left, right = nodes_[node].right;
  if (top == node) {
    set_top_child(parent, (left & right) == kNil ? kNil : merge(left, right));
  } else {
    // An eviction must not ask for memory.
    uint8_t* const scratch = rows_.get() + scratch_offset(num_blocks_, row_bytes_);
    int32_t* const own = reinterpret_cast<int32_t*>(scratch);
    copy_tokens(block, own);
    set_top_child(parent, take_out(top, node, {own, num_tokens(block)}));
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
