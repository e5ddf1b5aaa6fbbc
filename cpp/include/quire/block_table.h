// SPDX-License-Identifier: Apache-2.0
// BlockTable: where a sequence's tokens lie. Token t is in block [t / block_size], at offset
// t % block_size. It holds ids, not references: whoever changes it counts those. Its first ids may
// lie in memory that forks of the sequence share.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>
#include <vector>

namespace quire {

// Of how many tokens blocks are. Steps ask of every sequence in which block a position lies; most
// sizes are powers of two, and then no division answers.
class BlockSize {
 public:
  explicit BlockSize(int32_t num_tokens)
      : num_tokens_(num_tokens),
        shift_(num_tokens > 0 && std::has_single_bit(static_cast<uint32_t>(num_tokens))
                   ? std::countr_zero(static_cast<uint32_t>(num_tokens))
                   : -1) {}
  operator int32_t() const { return num_tokens_; }
  // Of a position, 0 or more.
  int64_t index(int64_t position) const {
    return shift_ >= 0 ? position >> shift_ : position / num_tokens_;
  }
  int64_t offset(int64_t position) const { return position - index(position) * num_tokens_; }
  int32_t blocks_for(int64_t num_tokens) const {
    return static_cast<int32_t>(index(num_tokens + num_tokens_ - 1));
  }

 private:
  int32_t num_tokens_;
  int32_t shift_;  // -1: no power of two
};

class BlockTable {
 public:
  explicit BlockTable(int32_t block_size) : block_size_(block_size) {}

  int32_t block_size() const { return block_size_; }
  int32_t size() const { return num_shared() + static_cast<int32_t>(own_.size()); }
  int32_t operator[](int32_t index) const {
    return index < num_shared() ? shared_[index] : own_[index - num_shared()];
  }
  std::vector<int32_t> ids() const;
  std::span<const int32_t> own_from(int32_t index) const {  // behind the shared ones
    return std::span(own_).subspan(index - num_shared());
  }

  // How many blocks `num_tokens` tokens take.
  int32_t blocks_for(int64_t num_tokens) const { return block_size_.blocks_for(num_tokens); }

  // Where the KV of a token lies: block * block_size + offset.
  int64_t slot(int64_t position) const {
    const int64_t index = block_size_.index(position);
    return int64_t{(*this)[static_cast<int32_t>(index)]} * block_size_ + position -
           index * block_size_;
  }

  // How many positions before `end` lie in the block of `position`, and not before that.
  int64_t left_in_block(int64_t position, int64_t end) const {
    return std::min(end - position, block_size_ - block_size_.offset(position));
  }

  void prefetch_end() const { __builtin_prefetch(own_.data() + own_.size(), 1); }
  void append(int32_t block) { own_.push_back(block); }
  // The row that was written last holds every id, by the caller's doing.
  void note_written() { num_written_ = size(); }
  void append(std::span<const int32_t> blocks);
  void reserve_more(int32_t num_blocks);  // beyond those that there are
  void reserve(int64_t num_tokens) { own_.reserve(static_cast<size_t>(blocks_for(num_tokens))); }
  // These two reach own ids only.
  void replace(int32_t index, int32_t block);
  void truncate(int32_t num_blocks);

  // Says that the first ids lie in `shared`: of an empty table, or of one that begins with them.
  void share(std::span<const int32_t> shared);
  int32_t num_shared() const { return static_cast<int32_t>(shared_.size()); }
  // Makes every id an own one.
  void unshare();
  void clear();

  // Brings row `row` of a batch's table up to date: its first `num_blocks` entries. `is_kept` says
  // that the row still holds what this table wrote there; then only changed entries are written.
  // Returns the first column that was.
  int32_t write_row(int32_t* out, int32_t row, bool is_kept, int32_t num_blocks);
  // Where write_row() wrote last (-1: nowhere), how many leading entries there are right, and that
  // so many of these have been copied to another row.
  int32_t row() const { return row_; }
  int32_t num_written() const { return num_written_; }
  void note_moved(int32_t row, int32_t num_moved) { row_ = row, num_written_ = num_moved; }

 private:
  BlockSize block_size_;
  int32_t row_ = -1;         // where write_row() wrote last,
  int32_t num_written_ = 0;  // and how many leading ids have not changed since
  std::span<const int32_t> shared_;
  std::vector<int32_t> own_;
};

}  // namespace quire
