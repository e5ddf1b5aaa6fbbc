// SPDX-License-Identifier: Apache-2.0
#include "quire/layer_groups.h"

#include <algorithm>
#include <utility>

#include "quire/error.h"

namespace quire {
namespace {

using Kind = LayerGroup::Kind;

void check_group(size_t index, const LayerGroup& group) {
  const bool has_size = group.kind == Kind::kSlidingWindow || group.kind == Kind::kChunkedLocal;
  const char* name = group.kind == Kind::kChunkedLocal ? "chunk" : "window";
  QUIRE_CHECK_ARG(!has_size || group.size >= 1, "KVCacheManager: groups[", index, "]: ", name,
                  ": expected 1 token or more, got ", group.size);
  QUIRE_CHECK_ARG(has_size || group.size == 0, "KVCacheManager: groups[", index,
                  "]: expected no window and no chunk of this kind, got ", group.size);
}

}  // namespace

CompanionCache::CompanionCache(std::vector<LayerGroup> groups, int32_t num_blocks,
                               int32_t block_size)
    : groups_(std::move(groups)), block_size_(block_size) {
  for (size_t i = 0; i < groups_.size(); ++i) check_group(i, groups_[i]);
  QUIRE_CHECK_ARG(groups_[0].kind == Kind::kFull,
                  "KVCacheManager: groups[0]: expected full attention, whose blocks the prefix "
                  "cache is made of; a model without such layers takes one full group for all");
  companions_.assign(groups_.size() - 1, std::vector<int32_t>(num_blocks, kNone));
  owners_.resize(num_blocks);
  runs_.resize(companions_.size());
}

int32_t CompanionCache::first_needed(int32_t group, int64_t num_tokens) const {
  const LayerGroup& rule = groups_[group];
  int64_t first = 0;
  if (rule.kind == Kind::kSlidingWindow) first = std::max<int64_t>(0, num_tokens - (rule.size - 1));
  if (rule.kind == Kind::kChunkedLocal) first = num_tokens / rule.size * rule.size;
  if (rule.kind == Kind::kState) first = std::max<int64_t>(0, num_tokens - 1);
  return static_cast<int32_t>(first / block_size_);
}

int64_t CompanionCache::most_blocks(int32_t group, int64_t num_tokens, int64_t max_step) const {
  const LayerGroup& rule = groups_[group];
  if (rule.kind == Kind::kState) return num_tokens > 0;
  const int64_t all = (num_tokens + block_size_ - 1) / block_size_;
  if (rule.kind == Kind::kFull || max_step >= num_tokens) return all;
  // size - 1 tokens before the step's own; a run of n tokens lies in (n - 1) / block_size + 1
  // blocks, rounded up, wherever it begins.
  const int64_t run = rule.size - 1 + max_step;
  return std::min(all, (run + block_size_ - 2) / block_size_ + 1);
}

size_t CompanionCache::usable_blocks(std::span<const int32_t> path) const {
  std::fill(runs_.begin(), runs_.end(), 0);
  size_t best = 0;
  for (size_t count = 1; count <= path.size(); ++count) {
    bool suffices = true;
    for (int32_t group = 1; group < num_groups(); ++group) {
      int32_t& run = runs_[group - 1];
      run = find(group, path[count - 1]) == kNone ? 0 : run + 1;
      const int64_t num_tokens = static_cast<int64_t>(count) * block_size_;
      suffices &= static_cast<int64_t>(count) - run <= first_needed(group, num_tokens);
    }
    if (suffices) best = count;
  }
  return best;
}

void CompanionCache::insert(int32_t group, int32_t node, int32_t block) {
  companions_[group - 1][node] = block;
  owners_[block] = {node, group};
  ++size_;
}

void CompanionCache::erase(int32_t block) {
  companions_[owners_[block].group - 1][owners_[block].node] = kNone;
  owners_[block] = {};
  --size_;
}

int32_t CompanionCache::any_of(int32_t node) const {
  for (const std::vector<int32_t>& of_group : companions_)
    if (of_group[node] != kNone) return of_group[node];
  return kNone;
}

int64_t CompanionCache::num_bytes() const {
  return static_cast<int64_t>(owners_.size() *
                              (sizeof(Owner) + companions_.size() * sizeof(int32_t)));
}

void CompanionCache::validate() const {
  int32_t num_owned = 0, num_companions = 0;
  for (size_t block = 0; block < owners_.size(); ++block) {
    const Owner& owner = owners_[block];
    if (owner.node == kNone) continue;
    ++num_owned;
    QUIRE_INVARIANT(find(owner.group, owner.node) == static_cast<int32_t>(block), "block ", block,
                    ": the companion of a block that has another");
  }
  for (const std::vector<int32_t>& of_group : companions_)
    num_companions += static_cast<int32_t>(
        std::count_if(of_group.begin(), of_group.end(), [](int32_t b) { return b != kNone; }));
  QUIRE_INVARIANT(num_owned == size_ && num_companions == size_, "the count of companions is off");
}

}  // namespace quire
