// SPDX-License-Identifier: Apache-2.0
#include "quire/decode_loop.h"

#include <algorithm>
#include <bit>

namespace quire {
namespace {

constexpr int32_t kKeptTokens = 64;  // of a row: fewer make rows due more often, more take memory

int32_t num_kept_of(int32_t block_size) { return std::max(1, kKeptTokens / block_size); }

}  // namespace

void DecodeLoop::reserve(size_t num_rows, int32_t block_size) {
  const size_t size = static_cast<size_t>(block_size);
  const size_t num_filled = num_rows * num_kept_of(block_size);
  rows_.reserve(num_rows);
  states_.reserve(num_rows);
  next_rank_.reserve(size);
  first_rank_.reserve(size + 1);
  columns_.reserve(std::bit_ceil(size) * num_rows);
  filled_.reserve(num_filled);
  tiles_.reserve(num_filled * size);
}

void DecodeLoop::begin(std::span<const int32_t> first, int32_t block_size) {
  block_size_ = block_size;
  num_commits_ = 0;
  rows_.resize(first.size());
  states_.resize(first.size());
  first_rank_.assign(static_cast<size_t>(block_size) + 1, 0);
  const auto begin_time = [=](int32_t position) {
    return (block_size - position % block_size) % block_size;
  };
  for (int32_t position : first) ++first_rank_[begin_time(position) + 1];
  for (int32_t time = 0; time < block_size; ++time) first_rank_[time + 1] += first_rank_[time];
  next_rank_.assign(first_rank_.begin(), first_rank_.end() - 1);
  for (size_t row = 0; row < first.size(); ++row) {
    const int32_t time = begin_time(first[row]);
    const int32_t rank = next_rank_[time]++;
    rows_[rank] = static_cast<int32_t>(row);
    states_[rank] = {time, first[row] / block_size + 1, kNone, kNone, 0, 0};
  }
  num_columns_ = std::bit_ceil(static_cast<size_t>(block_size));
  columns_.resize(num_columns_ * first.size());
  num_kept_ = num_kept_of(block_size);
  filled_.resize(num_kept_ * first.size());
  tiles_.resize(filled_.size() * block_size);
}

DecodeLoop::Ranks DecodeLoop::ranks_at(int64_t time) const {
  const int64_t phase = time % block_size_;
  return {first_rank_[phase], first_rank_[phase + 1]};
}

void DecodeLoop::drain_first(int32_t rank, std::vector<int32_t>* tokens) const {
  for (int64_t time = 0; time < num_commits_; ++time) tokens->push_back(column(time)[rank]);
}

// Column by column, whose ranks lie side by side.
void DecodeLoop::gather() {
  const Ranks ranks = filling();
  const int32_t count = ranks.last - ranks.first, size = block_size_;
  if (count == 0) return;
  int32_t* const out = &tiles_[kept_at(num_commits_, ranks.first) * size];
  for (int32_t i = 0; i < size; ++i) {
    const int32_t* const tokens = column(num_commits_ - size + i) + ranks.first;
    for (int32_t n = 0; n < count; ++n) out[int64_t{n} * size + i] = tokens[n];
  }
}

void DecodeLoop::set_filled(int32_t rank, int32_t block) {
  State& state = states_[rank];
  if (fills_first()) state.num_drained = 1;
  filled_[kept_at(num_commits_, rank)] = block;
  state.parent = block;
  state.block = kNone;
  ++state.num_filled;
}

int32_t DecodeLoop::next_due(int32_t rank) const {
  const int64_t turn = (num_commits_ / block_size_ + rank) % num_kept_;
  return rank + static_cast<int32_t>(turn == 0 ? 0 : num_kept_ - turn);
}

void DecodeLoop::drain(int32_t rank, bool is_replaced, BlockTable* table,
                       std::vector<int32_t>* tokens) {
  State& state = states_[rank];
  for (; state.num_drained < state.num_filled; ++state.num_drained) {
    const int64_t time = int64_t{state.num_drained} * block_size_;
    const int32_t* const own = tile(time, rank);
    tokens->insert(tokens->end(), own, own + block_size_);
    table->append(filled_[kept_at(time, rank)]);
    if (!is_replaced || state.num_drained + 1 < state.num_filled) table->note_written();
  }
}

void DecodeLoop::drain_at_end(int32_t rank, bool is_replaced, BlockTable* table,
                              std::vector<int32_t>* tokens) {
  drain(rank, is_replaced, table, tokens);
  const State& state = states_[rank];
  // It filled a block one commit before it began the next.
  const int64_t since = (num_commits_ - state.begin_time) % block_size_;
  const int64_t filled = num_commits_ - 1 - (since < 0 ? since + block_size_ : since);
  for (int64_t time = std::max<int64_t>(filled, 0); time < num_commits_; ++time)
    tokens->push_back(column(time)[rank]);
  if (state.block == kNone) return;
  table->append(state.block);
  table->note_written();
}

void DecodeLoop::commit(std::span<const int32_t> sampled) {
  int32_t* const out = &columns_[(num_commits_ & (num_columns_ - 1)) * rows_.size()];
  const int32_t* const rows = rows_.data();
  for (size_t rank = 0; rank < sampled.size(); ++rank) out[rank] = sampled[rows[rank]];
  ++num_commits_;
}

}  // namespace quire
