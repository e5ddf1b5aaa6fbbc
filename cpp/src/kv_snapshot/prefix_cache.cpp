// SPDX-License-Identifier: Apache-2.0
// The tree of cached blocks as numbers: roots with their salts, then blocks, parents first.
#include "quire/prefix_cache.h"

#include <algorithm>

#include "kv_snapshot/json.h"
#include "quire/error.h"

namespace quire {

std::vector<int32_t> PrefixCache::parents_first() const {
  std::vector<int32_t> order, path, depth(static_cast<size_t>(num_blocks_));  // 0: not known yet
  for (int32_t block = 0; block < num_blocks_; ++block) {
    if (!contains(block)) continue;
    for (int32_t at = block; at >= 0 && depth[at] == 0; at = parent(at)) path.push_back(at);
    for (; !path.empty(); path.pop_back()) {
      const int32_t above = parent(path.back());
      depth[path.back()] = above < 0 ? 1 : depth[above] + 1;
      order.push_back(path.back());
    }
  }
  // Of siblings the shortest first: insert() refuses the beginning of one that is there.
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return depth[a] != depth[b] ? depth[a] < depth[b] : num_tokens(a) < num_tokens(b);
  });
  return order;
}

std::vector<int64_t> PrefixCache::save() const {
  snapshot::Numbers numbers = {seed_, static_cast<int64_t>(roots_.size())};
  for (const Root& root : roots_) {
    numbers.push_back(root.salt ? static_cast<int64_t>(root.salt->size()) : -1);
    if (root.salt)
      for (char byte : *root.salt) numbers.push_back(static_cast<uint8_t>(byte));
  }
  for (int32_t block : parents_first()) {
    numbers.push_back(block);
    numbers.push_back(parent(block));
    snapshot::put_list(numbers, tokens(block));
  }
  return numbers;
}

void PrefixCache::load(std::span<const int64_t> numbers) {
  const snapshot::Object object{{"tree", {numbers.begin(), numbers.end()}}};
  snapshot::Reader reader(object, "tree");
  seed_ = static_cast<uint32_t>(reader.next(0, UINT32_MAX));
  roots_.resize(static_cast<size_t>(reader.next(1, static_cast<int64_t>(numbers.size()))));
  for (size_t i = 0; i < roots_.size(); ++i) {
    const int32_t root = -1 - static_cast<int32_t>(i);
    const int64_t size = reader.next(-1, static_cast<int64_t>(numbers.size()));
    if (size < 0 && i > 0) idle_roots_.push_back(root);
    if (size < 0) continue;
    std::string& salt = roots_[i].salt.emplace();
    for (int64_t n = 0; n < size; ++n) salt += static_cast<char>(reader.next(0, UINT8_MAX));
    if (i == 0 || !roots_by_salt_.emplace(salt, root).second)
      reader.refuse("no salt first, then each once");
  }
  while (!reader.is_at_end()) {
    const int32_t block = reader.next_int32(0, num_blocks_ - 1);
    const int32_t parent = reader.next_int32(INT32_MIN, num_blocks_ - 1);
    const std::vector<int32_t> tokens = reader.next_list();
    const bool is_good =
        parent < 0 ? is_open(parent) : contains(parent) && num_tokens(parent) == block_size_;
    if (!is_good || contains(block) || tokens.empty() ||
        tokens.size() > static_cast<size_t>(block_size_))
      reader.refuse("blocks after their parents, each once");
    if (insert(parent, tokens.data(), static_cast<int32_t>(tokens.size()), block) != block)
      reader.refuse("different blocks");
  }
}

}  // namespace quire
