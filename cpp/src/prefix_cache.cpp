// SPDX-License-Identifier: Apache-2.0
// A tree over block ids plus a chained hash table over the same ids.
#include "quire/prefix_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <random>
#include <utility>

#include "quire/error.h"

namespace quire {
namespace {

constexpr int32_t kUnsaltedRoot = -1;  // never dropped

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15;  // 2^64 / golden ratio
  return hash ^ (hash >> 29);
}

}  // namespace

PrefixCache::PrefixCache(int32_t num_blocks, int32_t block_size) : block_size_(block_size) {
  std::random_device random;
  seed_ = (uint64_t{random()} << 32) | random();
  const size_t count = static_cast<size_t>(num_blocks);
  parent_.assign(count, kNone);
  num_children_.assign(count, 0);
  newest_child_.assign(count, kNone);
  next_.assign(count, kNone);
  buckets_.assign(std::bit_ceil(count), kNone);
  tokens_ = std::make_unique_for_overwrite<int32_t[]>(count * static_cast<size_t>(block_size));
  roots_.emplace_back();
}

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
  if (root == kUnsaltedRoot || entry.num_holders > 0 || entry.num_children > 0) return;
  roots_by_salt_.erase(*entry.salt);
  entry = Root{};
  idle_roots_.push_back(root);
}

int32_t PrefixCache::newest_child(int32_t parent) const {
  return parent < 0 ? root_of(parent).newest_child : newest_child_[parent];
}

void PrefixCache::add_child(int32_t parent, int32_t child) {
  if (parent < 0) {
    ++root_of(parent).num_children;
    root_of(parent).newest_child = child;
  } else {
    ++num_children_[parent];
    newest_child_[parent] = child;
  }
}

void PrefixCache::remove_child(int32_t parent, int32_t child) {
  int32_t& newest = parent < 0 ? root_of(parent).newest_child : newest_child_[parent];
  if (newest == child) newest = kNone;
  if (parent < 0) {
    --root_of(parent).num_children;
    drop_root_if_idle(parent);
  } else {
    --num_children_[parent];
  }
}

int32_t& PrefixCache::bucket_of(int32_t parent, const int32_t* tokens) {
  return const_cast<int32_t&>(std::as_const(*this).bucket_of(parent, tokens));
}

const int32_t& PrefixCache::bucket_of(int32_t parent, const int32_t* tokens) const {
  uint64_t hash = mix(seed_, static_cast<uint32_t>(parent));
  int32_t i = 0;
  for (; i + 1 < block_size_; i += 2) {
    uint64_t pair;
    std::memcpy(&pair, &tokens[i], sizeof(pair));
    hash = mix(hash, pair);
  }
  if (i < block_size_) hash = mix(hash, static_cast<uint32_t>(tokens[i]));
  return buckets_[(hash ^ (hash >> 32)) & (buckets_.size() - 1)];
}

bool PrefixCache::holds(int32_t block, int32_t parent, const int32_t* tokens) const {
  return parent_[block] == parent &&
         std::memcmp(this->tokens(block), tokens, sizeof(int32_t) * block_size_) == 0;
}

int32_t PrefixCache::find_from(int32_t first, int32_t parent, const int32_t* tokens) const {
  while (first != kNone && !holds(first, parent, tokens)) first = next_[first];
  return first;
}

int32_t PrefixCache::find(int32_t parent, const int32_t* tokens) const {
  const int32_t newest = newest_child(parent);
  if (newest != kNone && holds(newest, parent, tokens)) return newest;
  return find_from(bucket_of(parent, tokens), parent, tokens);
}

int32_t PrefixCache::insert(int32_t parent, const int32_t* tokens, int32_t block) {
  int32_t& bucket = bucket_of(parent, tokens);
  const int32_t found = find_from(bucket, parent, tokens);
  if (found != kNone) return found;
  std::copy_n(tokens, block_size_, &tokens_[int64_t{block} * block_size_]);
  parent_[block] = parent;
  num_children_[block] = 0;
  newest_child_[block] = kNone;
  next_[block] = bucket;
  bucket = block;
  add_child(parent, block);
  ++size_;
  return block;
}

void PrefixCache::erase(int32_t block) {
  QUIRE_INVARIANT(contains(block), "block ", block, ": evicted, but not cached");
  QUIRE_INVARIANT(num_children_[block] == 0, "block ", block, ": evicted before its children");
  const int32_t parent = parent_[block];
  int32_t* link = &bucket_of(parent, tokens(block));
  while (*link != block) link = &next_[*link];
  *link = next_[block];
  parent_[block] = kNone;
  --size_;
  remove_child(parent, block);
}

void PrefixCache::validate() const {
  std::vector<int32_t> num_children(parent_.size(), 0);
  std::vector<int64_t> num_root_children(roots_.size(), 0);
  int32_t num_cached = 0;
  for (size_t i = 0; i < parent_.size(); ++i) {
    const int32_t block = static_cast<int32_t>(i);
    const int32_t parent = parent_[block];
    if (parent == kNone) continue;
    ++num_cached;
    QUIRE_INVARIANT(parent < 0 || contains(parent), "block ", block, ": parent ", parent,
                    " is not cached");
    if (parent < 0)
      ++num_root_children[-1 - parent];
    else
      ++num_children[parent];
    QUIRE_INVARIANT(find(parent, tokens(block)) == block, "block ", block, ": not found");
    const int32_t newest = newest_child_[block];
    QUIRE_INVARIANT(newest == kNone || parent_[newest] == block, "block ", block, ": lost child");
  }
  QUIRE_INVARIANT(num_cached == size_, "size is off");
  for (size_t i = 0; i < parent_.size(); ++i)
    QUIRE_INVARIANT(parent_[i] == kNone || num_children[i] == num_children_[i], "block ", i,
                    ": num_children is off");
  for (size_t i = 0; i < roots_.size(); ++i)
    QUIRE_INVARIANT(num_root_children[i] == roots_[i].num_children, "root ", i,
                    ": num_children is off");
  QUIRE_INVARIANT(roots_by_salt_.size() + idle_roots_.size() + 1 == roots_.size(),
                  "a root is neither in use nor idle");
}

}  // namespace quire
