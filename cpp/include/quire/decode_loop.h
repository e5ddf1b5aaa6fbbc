// SPDX-License-Identifier: Apache-2.0
// DecodeLoop: which sequences of a batch need work when all of them gain one token a step.
//
// Row i begins with a pending token at position first[i]; each commit moves every row on by one. A
// row begins a block, and fills one, every block_size commits, so that the rows which do so at a
// given time are known beforehand: they are ranked once by the time when they do. New tokens are
// kept as one column a commit, by rank, and given to their sequence when it fills a block.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace quire {

class DecodeLoop {
 public:
  static constexpr int32_t kMaxBlockSize = 1024;  // beyond that columns would take too much

  bool is_running() const { return !rows_.empty(); }
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

  // Appends to `tokens` what a row has gained since it was drained last. A row that fills a block
  // is to be drained before commit(); end() comes after all rows were.
  void drain_filling(int32_t rank, std::vector<int32_t>* tokens) const;
  void drain_at_end(int32_t rank, std::vector<int32_t>* tokens) const;

  // One new token of each row.
  void commit(std::span<const int32_t> sampled);

 private:
  Ranks ranks_at(int64_t time) const;
  void drain(int32_t rank, int64_t first, std::vector<int32_t>* tokens) const;

  int32_t block_size_ = 1;
  int64_t num_commits_ = 0;
  std::vector<int32_t> rows_;        // by rank
  std::vector<int32_t> first_rank_;  // [block_size + 1] of the rows that begin a block at a time
  std::vector<int32_t> begin_time_;  // by rank: when, modulo block_size
  size_t num_columns_ = 1;           // a power of two, block_size or more
  std::vector<int32_t> columns_;     // [num_columns, rows] tokens of the latest commits, by rank
};

}  // namespace quire
