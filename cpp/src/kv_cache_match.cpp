// SPDX-License-Identifier: Apache-2.0
// What of a sequence the prefix cache holds, and how many blocks it lacks.
#include <algorithm>
#include <cstring>

#include "quire/kv_cache_manager.h"

namespace quire {
namespace {

constexpr int32_t kMatchedAtOnce = 512;  // tokens, before a match gives way

}  // namespace

// The cached blocks of a prefix, in path_. The last may be one of which only some leading tokens
// are equal. Returns the length of that prefix in tokens.
int64_t KVCacheManager::find_path(int32_t root, std::span<const int32_t> tokens) const {
  path_.clear();
  if (!cache_ || root == PrefixCache::kNone) return 0;
  const int64_t found =
      cache_->find_path(root, tokens.data(), static_cast<int64_t>(tokens.size()), &path_);
  if (!companions_) return found;
  path_.resize(companions_->usable_blocks(std::span(path_).first(found / block_size_)));
  return static_cast<int64_t>(path_.size()) * block_size_;
}

// The whole blocks of each group that the prefix takes. It does not give way. Leaves in path_ what
// find_path() does.
PrefixMatch KVCacheManager::match_at_once(int32_t root, std::span<const int32_t> tokens) const {
  PrefixMatch result;
  result.num_tokens = find_path(root, tokens.first(tokens.size() - 1));
  const size_t num_whole = static_cast<size_t>(block_size_.index(result.num_tokens));
  const auto count = [&](int32_t block) {
    ++result.num_blocks;
    result.num_idle_blocks += allocator_.refcount(block) == 0;
  };
  for (size_t i = 0; i < num_whole; ++i) count(path_[i]);
  for (int32_t group = 1; group < num_groups(); ++group)
    for (size_t i = companions_->first_needed(group, result.num_tokens); i < num_whole; ++i)
      count(companions_->find(group, path_[i]));
  return result;
}

// Looks at a few blocks at a time and gives way in between, if the lock is a patient one. Nothing
// if the last block found so far was evicted meanwhile: what is left of the path is unknown then.
// (While it is there, so are those before it.)
std::optional<PrefixMatch> KVCacheManager::match(int32_t root,
                                                 std::span<const int32_t> tokens) const {
  PrefixMatch result;
  if (!cache_ || root == PrefixCache::kNone || tokens.empty()) return result;
  if (companions_) return match_at_once(root, tokens);
  const int64_t count = static_cast<int64_t>(tokens.size()) - 1;
  const int64_t most = std::max(kMatchedAtOnce / block_size_, 1) * int64_t{block_size_};
  std::vector<int32_t> path;
  for (int32_t parent = root; result.num_tokens < count; parent = path.back()) {
    if (parent != root && mutex_.is_wanted() && !give_way_at(parent)) return std::nullopt;
    const int32_t* next = tokens.data() + result.num_tokens;
    const int64_t num_asked = std::min(most, count - result.num_tokens);
    const int64_t num_found = cache_->find_path(parent, next, num_asked, &path);
    result.num_tokens += num_found;
    for (int64_t i = 0; i < num_found / block_size_; ++i)  // whole blocks
      result.num_idle_blocks += allocator_.refcount(path[i]) == 0;
    if (num_found < most) break;
  }
  result.num_blocks = static_cast<int32_t>(result.num_tokens / block_size_);
  return result;
}

// False: `block` was evicted meanwhile.
bool KVCacheManager::give_way_at(int32_t block) const {
  YieldedMatch reader{block, false, yielded_};
  yielded_ = &reader;
  mutex_.give_way();
  YieldedMatch** link = &yielded_;
  while (*link != &reader) link = &(*link)->next;
  *link = reader.next;
  return !reader.is_lost;
}

PrefixMatch KVCacheManager::match(std::span<const int32_t> token_ids, Salt salt) const {
  const PatientLock patience(mutex_);
  for (;;)
    if (const auto found = match(cache_ ? cache_->find_root(salt) : PrefixCache::kNone, token_ids))
      return *found;
}

PrefixMatch KVCacheManager::match(SequenceId id) const {
  const std::lock_guard guard(mutex_);
  settle();
  const Sequence& seq = get(id);
  return seq.trunk ? match_at_once(seq.root, tokens(id)) : match_at_once(seq.root, seq.tokens);
}

int64_t KVCacheManager::shareable_tokens(SequenceId a, SequenceId b, int64_t more_than) const {
  const std::lock_guard guard(mutex_);
  settle();
  if (!cache_ || get(a).root != get(b).root) return 0;
  std::vector<int32_t> whole[2];  // of forks, whose tokens lie in two places
  std::span<const int32_t> both[2];
  for (int i = 0; i < 2; ++i) {
    const Sequence& seq = get(i == 0 ? a : b);
    if (seq.trunk) whole[i] = tokens(seq.id);
    both[i] = seq.trunk ? whole[i] : seq.tokens;
  }
  const size_t block = static_cast<size_t>(block_size_);
  const size_t most = std::min(both[0].size(), both[1].size());
  const auto is_equal = [&](size_t at) {
    return at + block <= most &&
           std::memcmp(&both[0][at], &both[1][at], block * sizeof(int32_t)) == 0;
  };
  if (!is_equal(static_cast<size_t>(more_than) / block * block)) return 0;  // most often
  size_t shared = 0;
  while (is_equal(shared)) shared += block;
  return static_cast<int64_t>(shared) > more_than ? static_cast<int64_t>(shared) : 0;
}

int32_t KVCacheManager::num_missing_blocks(SequenceId id, int64_t num_tokens,
                                           int64_t max_step) const {
  const std::lock_guard guard(mutex_);
  settle();
  const Sequence& seq = get(id);
  int64_t missing = std::max(0, seq.table.blocks_for(num_tokens) - seq.table.size());
  if (companions_) missing += missing_in_groups(seq, num_tokens, max_step);
  for (int32_t group = 0; num_tokens > seq.num_computed && group < num_groups(); ++group)
    missing += shares_last_block(seq, group);
  return static_cast<int32_t>(missing);
}

}  // namespace quire
