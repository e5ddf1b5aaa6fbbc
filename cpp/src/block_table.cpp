// SPDX-License-Identifier: Apache-2.0
#include "quire/block_table.h"

#include <algorithm>

#include "reserve_more.h"

namespace quire {

std::vector<int32_t> BlockTable::ids() const {
  std::vector<int32_t> result(shared_.begin(), shared_.end());
  result.insert(result.end(), own_.begin(), own_.end());
  return result;
}

void BlockTable::reserve_more(int32_t num_blocks) {
  quire::reserve_more(own_, static_cast<size_t>(num_blocks));
}

void BlockTable::append(std::span<const int32_t> blocks) {
  own_.insert(own_.end(), blocks.begin(), blocks.end());
}

void BlockTable::replace(int32_t index, int32_t block) {
  own_[index - num_shared()] = block;
  num_written_ = std::min(num_written_, index);
}

void BlockTable::truncate(int32_t num_blocks) {
  own_.resize(num_blocks - num_shared());
  num_written_ = std::min(num_written_, num_blocks);
}

void BlockTable::share(std::span<const int32_t> shared) {
  const size_t num_moved = std::min(own_.size(), shared.size() - shared_.size());
  own_.erase(own_.begin(), own_.begin() + static_cast<int64_t>(num_moved));
  shared_ = shared;
}

void BlockTable::unshare() {
  own_.insert(own_.begin(), shared_.begin(), shared_.end());
  shared_ = {};
}

void BlockTable::clear() {
  own_.clear();
  shared_ = {};
  row_ = -1;
  num_written_ = 0;
}

int32_t BlockTable::write_row(int32_t* out, int32_t row, bool is_kept, int32_t num_blocks) {
  if (!is_kept || row_ != row) num_written_ = 0;
  row_ = row;
  const int32_t first = num_written_;
  const int32_t num_from_shared = std::min(num_blocks, num_shared());
  if (first < num_from_shared)
    std::copy(shared_.begin() + first, shared_.begin() + num_from_shared, out + first);
  const int32_t first_own = std::max(first, num_shared());
  if (first_own < num_blocks)
    std::copy(own_.begin() + (first_own - num_shared()), own_.begin() + (num_blocks - num_shared()),
              out + first_own);
  num_written_ = std::max(first, num_blocks);
  return first;
}

}  // namespace quire
