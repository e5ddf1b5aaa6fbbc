// SPDX-License-Identifier: Apache-2.0
#include "quire/decode_loop.h"

#include <algorithm>
#include <bit>

namespace quire {

void DecodeLoop::begin(std::span<const int32_t> first, int32_t block_size) {
  block_size_ = block_size;
  num_commits_ = 0;
  rows_.resize(first.size());
  begin_time_.resize(first.size());
  first_row_.assign(static_cast<size_t>(block_size) + 1, 0);
  for (size_t i = 0; i < first.size(); ++i) {
    begin_time_[i] = (block_size - first[i] % block_size) % block_size;
    ++first_row_[begin_time_[i] + 1];
  }
  for (int32_t time = 0; time < block_size; ++time) first_row_[time + 1] += first_row_[time];
  std::vector<int32_t> next(first_row_.begin(), first_row_.end() - 1);
  for (size_t i = 0; i < first.size(); ++i) rows_[next[begin_time_[i]]++] = static_cast<int32_t>(i);
  num_columns_ = std::bit_ceil(static_cast<size_t>(block_size));
  columns_.resize(num_columns_ * first.size());
}

std::span<const int32_t> DecodeLoop::rows_at(int64_t time) const {
  const int64_t phase = time % block_size_;
  return std::span(rows_).subspan(first_row_[phase], first_row_[phase + 1] - first_row_[phase]);
}

void DecodeLoop::drain(int32_t row, int64_t first, std::vector<int32_t>* tokens) const {
  for (int64_t i = std::max<int64_t>(first, 0); i < num_commits_; ++i)
    tokens->push_back(columns_[(i & (num_columns_ - 1)) * rows_.size() + row]);
}

void DecodeLoop::drain_filling(int32_t row, std::vector<int32_t>* tokens) const {
  drain(row, num_commits_ - block_size_, tokens);
}

// The row was drained when it last filled a block, one commit before it began the next.
void DecodeLoop::drain_at_end(int32_t row, std::vector<int32_t>* tokens) const {
  const int64_t since = (num_commits_ - begin_time_[row]) % block_size_;
  drain(row, num_commits_ - 1 - (since < 0 ? since + block_size_ : since), tokens);
}

void DecodeLoop::commit(std::span<const int32_t> sampled) {
  std::copy(
      sampled.begin(), sampled.end(),
      columns_.begin() + static_cast<int64_t>((num_commits_ & (num_columns_ - 1)) * rows_.size()));
  ++num_commits_;
}

}  // namespace quire
