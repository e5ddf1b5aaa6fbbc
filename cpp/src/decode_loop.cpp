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
  first_rank_.assign(static_cast<size_t>(block_size) + 1, 0);
  const auto begin_time = [=](int32_t position) {
    return (block_size - position % block_size) % block_size;
  };
  for (int32_t position : first) ++first_rank_[begin_time(position) + 1];
  for (int32_t time = 0; time < block_size; ++time) first_rank_[time + 1] += first_rank_[time];
  std::vector<int32_t> next(first_rank_.begin(), first_rank_.end() - 1);
  for (size_t row = 0; row < first.size(); ++row) {
    const int32_t time = begin_time(first[row]);
    const int32_t rank = next[time]++;
    rows_[rank] = static_cast<int32_t>(row);
    begin_time_[rank] = time;
  }
  num_columns_ = std::bit_ceil(static_cast<size_t>(block_size));
  columns_.resize(num_columns_ * first.size());
}

DecodeLoop::Ranks DecodeLoop::ranks_at(int64_t time) const {
  const int64_t phase = time % block_size_;
  return {first_rank_[phase], first_rank_[phase + 1]};
}

void DecodeLoop::drain(int32_t rank, int64_t first, std::vector<int32_t>* tokens) const {
  first = std::max<int64_t>(first, 0);
  const size_t size = tokens->size();
  tokens->resize(size + static_cast<size_t>(num_commits_ - first));
  for (int32_t* out = tokens->data() + size; first < num_commits_; ++first)
    *out++ = columns_[(first & (num_columns_ - 1)) * rows_.size() + rank];
}

void DecodeLoop::drain_filling(int32_t rank, std::vector<int32_t>* tokens) const {
  drain(rank, num_commits_ - block_size_, tokens);
}

// The row was drained when it last filled a block, one commit before it began the next.
void DecodeLoop::drain_at_end(int32_t rank, std::vector<int32_t>* tokens) const {
  const int64_t since = (num_commits_ - begin_time_[rank]) % block_size_;
  drain(rank, num_commits_ - 1 - (since < 0 ? since + block_size_ : since), tokens);
}

void DecodeLoop::commit(std::span<const int32_t> sampled) {
  int32_t* const column = &columns_[(num_commits_ & (num_columns_ - 1)) * rows_.size()];
  for (size_t rank = 0; rank < rows_.size(); ++rank) column[rank] = sampled[rows_[rank]];
  ++num_commits_;
}

}  // namespace quire
