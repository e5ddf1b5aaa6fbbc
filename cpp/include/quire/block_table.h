// SPDX-License-Identifier: Apache-2.0
// BlockTable: where a sequence's tokens lie. Token t is in block ids()[t / block_size], at offset
// t % block_size. It holds ids, not references: whoever changes it counts those.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace quire {

class BlockTable {
 public:
  explicit BlockTable(int32_t block_size) : block_size_(block_size) {}

  int32_t size() const { return static_cast<int32_t>(ids_.size()); }
  int32_t operator[](int32_t index) const { return ids_[index]; }
  std::span<const int32_t> ids() const { return ids_; }

  // How many blocks `num_tokens` tokens take.
  int32_t blocks_for(int64_t num_tokens) const {
    return static_cast<int32_t>((num_tokens + block_size_ - 1) / block_size_);
  }
  // Where the KV of a token lies: block * block_size + offset.
  int64_t slot(int64_t position) const {
    return int64_t{ids_[position / block_size_]} * block_size_ + position % block_size_;
  }
  // The first position behind the block of a token.
  int64_t block_end(int64_t position) const {
    return position - position % block_size_ + block_size_;
  }

  void append(int32_t block) { ids_.push_back(block); }
  void append(std::span<const int32_t> blocks);
  void replace(int32_t index, int32_t block);
  void truncate(int32_t num_blocks);
  // A table of the same first `num_blocks` ids.
  BlockTable fork(int32_t num_blocks) const;

  // Brings row `row` of a batch's table up to date: its first `num_blocks` entries. `is_kept` says
  // that the row still holds what this table wrote there; then only changed entries are written.
  void write_row(int32_t* out, int32_t row, bool is_kept, int32_t num_blocks);

 private:
  int32_t block_size_;
  int32_t row_ = -1;         // where write_row() wrote last,
  int32_t num_written_ = 0;  // and how many leading ids have not changed since
  std::vector<int32_t> ids_;
};

}  // namespace quire
