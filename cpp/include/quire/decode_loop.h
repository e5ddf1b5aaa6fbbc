// SPDX-License-Identifier: Apache-2.0
// DecodeLoop: which sequences of a batch need work when all of them gain one token a step.
//
// Row i begins with a pending token at position first[i]; each commit moves every row on by one. A
// row begins a block, and fills one, every block_size commits, so that the rows which do so at a
// given time are known beforehand: they are ranked once by the time when they do. New tokens are
// kept as one column a commit, by rank, and gathered when their row fills a block. What is needed
// of a row then lies beside that of the next rank; its sequence, which lies anywhere, gets tokens
// and blocks a few blocks at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "quire/block_table.h"

namespace quire {

class DecodeLoop {
 public:
  static constexpr int32_t kMaxBlockSize = 1024;  // beyond that columns would take too much

  bool is_running() const { return !rows_.empty(); }
  // After reserve() of as many rows, begin() does not throw.
  void reserve(size_t num_rows, int32_t block_size);
  void begin(std::span<const int32_t> first, int32_t block_size);
  void end() { rows_.clear(); }

  // The ranks [first, last) of rows whose pending token begins a block, or fills one.
  struct Ranks {
    int32_t first, last;
  };
  Ranks beginning() const { return ranks_at(num_commits_); }
  Ranks filling() const { return ranks_at(num_commits_ + 1); }
  int32_t row(int32_t rank) const { return rows_[rank]; }
  int32_t size() const { return static_cast<int32_t>(rows_.size()); }

  // The block that a row's pending token is in, how many blocks it has with it, and the filled one
  // before; the latter only once fills_first() is over.
  int32_t block(int32_t rank) const { return states_[rank].block; }
  int32_t num_blocks(int32_t rank) const { return states_[rank].num_blocks; }
  int32_t parent(int32_t rank) const { return states_[rank].parent; }
  void begin_block(int32_t rank, int32_t block) {
    states_[rank].block = block;
    ++states_[rank].num_blocks;
  }

  // Rows that fill a block for the first time since begin(): this block and some of its tokens are
  // their sequences' own, which get the others.
  bool fills_first() const { return num_commits_ < block_size_; }
  void drain_first(int32_t rank, std::vector<int32_t>* tokens) const;
  // Later on, after gather(): the tokens of the block that a row fills.
  void gather();
  const int32_t* filling_tokens(int32_t rank) const { return tile(num_commits_, rank); }

  // Says which block, of those that hold the same tokens, a filling row has in the end.
  void set_filled(int32_t rank, int32_t block);
  // Then the first row from this rank on that is to be drained; the next is num_kept() behind it.
  int32_t next_due(int32_t rank) const;
  int32_t num_kept() const { return num_kept_; }

  // Gives a sequence the filled blocks that its row has gained since it was drained last, and their
  // tokens. The batch holds these blocks, unless the last of them `is_replaced`. A row that has
  // just filled a block is to be drained before commit().
  void drain(int32_t rank, bool is_replaced, BlockTable* table, std::vector<int32_t>* tokens);
  // And what it has gained since it filled a block. end() comes after all rows were drained so.
  void drain_at_end(int32_t rank, bool is_replaced, BlockTable* table,
                    std::vector<int32_t>* tokens);

  // One new token of each row.
  void commit(std::span<const int32_t> sampled);

 private:
  struct State {
    int32_t begin_time;  // when it begins a block, modulo block_size
    int32_t num_blocks;
    int32_t block;   // kNone: not begun
    int32_t parent;  // the latest filled one
    int32_t num_filled, num_drained;
  };
  static constexpr int32_t kNone = -1;

  Ranks ranks_at(int64_t time) const;
  // Where a row keeps what it filled at a time, among the latest num_kept of all.
  size_t kept_at(int64_t time, int32_t rank) const {
    return static_cast<size_t>(time / block_size_ % num_kept_) * rows_.size() + rank;
  }
  const int32_t* tile(int64_t time, int32_t rank) const {
    return &tiles_[kept_at(time, rank) * block_size_];
  }
  const int32_t* column(int64_t time) const {
    return &columns_[(time & (num_columns_ - 1)) * rows_.size()];
  }

  int32_t block_size_ = 1;
  int32_t num_kept_ = 1;  // filled blocks of a row until it is due
  int64_t num_commits_ = 0;
  std::vector<int32_t> rows_;        // by rank
  std::vector<State> states_;        // by rank
  std::vector<int32_t> next_rank_;   // [block_size], scratch
  std::vector<int32_t> first_rank_;  // [block_size + 1] of the rows that begin a block at a time
  size_t num_columns_ = 1;           // a power of two, block_size or more
  std::vector<int32_t> columns_;     // [num_columns, rows] tokens of the latest commits, by rank
  std::vector<int32_t> filled_;      // [num_kept, rows] blocks
  std::vector<int32_t> tiles_;       // [num_kept, rows, block_size] their tokens
};

}  // namespace quire
