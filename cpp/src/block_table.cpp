// SPDX-License-Identifier: Apache-2.0
#include "quire/block_table.h"

#include <algorithm>

namespace quire {

void BlockTable::append(std::span<const int32_t> blocks) {
  ids_.insert(ids_.end(), blocks.begin(), blocks.end());
}

void BlockTable::replace(int32_t index, int32_t block) {
  ids_[index] = block;
  num_written_ = std::min(num_written_, index);
}

void BlockTable::truncate(int32_t num_blocks) {
  ids_.resize(num_blocks);
  num_written_ = std::min(num_written_, num_blocks);
}

BlockTable BlockTable::fork(int32_t num_blocks) const {
  BlockTable child(block_size_);
  child.ids_.assign(ids_.begin(), ids_.begin() + num_blocks);
  return child;
}

void BlockTable::write_row(int32_t* out, int32_t row, bool is_kept, int32_t num_blocks) {
  if (!is_kept || row_ != row) num_written_ = 0;
  row_ = row;
  for (; num_written_ < num_blocks; ++num_written_) out[num_written_] = ids_[num_written_];
}

}  // namespace quire
