// SPDX-License-Identifier: Apache-2.0
#include "quire/step_batch.h"

#include <algorithm>
#include <bit>

namespace quire {

void StepBatch::reserve_rows(int32_t batch_size, int32_t max_blocks) {
  const size_t num_rows = static_cast<size_t>(batch_size);
  if (num_rows <= row_serials_.size() && max_blocks <= block_table_stride_) return;
  block_table_stride_ =
      std::max(block_table_stride_, static_cast<int64_t>(std::bit_ceil(uint64_t(max_blocks))));
  row_serials_.assign(std::max(row_serials_.size(), std::bit_ceil(num_rows)), 0);
  block_table_ = {};
  block_table_.resize(row_serials_.size() * block_table_stride_);
}

void StepBatch::begin(int64_t ticket, int32_t batch_size, int32_t max_blocks,
                      int64_t num_new_tokens, int64_t num_copies) {
  reserve_rows(batch_size, max_blocks);
  ticket_ = ticket;
  batch_size_ = batch_size;
  max_blocks_ = max_blocks;
  num_rows_ = 0;
  seq_lens_.resize(batch_size);
  cu_seqlens_q_.resize(batch_size + 1);
  cu_seqlens_q_[0] = 0;
  slot_mapping_.resize(num_new_tokens);
  positions_.resize(num_new_tokens);
  copies_.resize(2 * num_copies);
  copies_.resize(0);
}

void StepBatch::add_row(int64_t serial, BlockTable& table, int64_t first, int64_t end) {
  const int32_t row = num_rows_++;
  table.write_row(&block_table_[row * block_table_stride_], row, row_serials_[row] == serial,
                  table.blocks_for(end));
  row_serials_[row] = serial;
  seq_lens_[row] = static_cast<int32_t>(end);
  const int32_t start = cu_seqlens_q_[row] - static_cast<int32_t>(first);
  cu_seqlens_q_[row + 1] = static_cast<int32_t>(end) + start;
  for (int64_t position = first; position < end;) {
    int64_t slot = table.slot(position);
    const int64_t block_end = std::min(end, table.block_end(position));
    for (; position < block_end; ++position, ++slot) {
      slot_mapping_[start + position] = slot;
      positions_[start + position] = static_cast<int32_t>(position);
    }
  }
}

void StepBatch::add_copy(int32_t source, int32_t destination) {
  copies_.push_back(source);
  copies_.push_back(destination);
}

}  // namespace quire
