// SPDX-License-Identifier: Apache-2.0
#include "quire/step_batch.h"

#include <algorithm>
#include <bit>

namespace quire {

int64_t StepBatch::stride_for(int32_t max_blocks) const {
  return std::max(block_table_stride_, static_cast<int64_t>(std::bit_ceil(uint64_t(max_blocks))));
}

int64_t StepBatch::rows_for(int32_t batch_size) const {
  return std::max(static_cast<int64_t>(row_serials_.size()),
                  static_cast<int64_t>(std::bit_ceil(uint64_t(batch_size))));
}

bool StepBatch::may_hold(const Size& size) const {
  return rows_for(size.batch_size) * stride_for(size.max_blocks) <= INT32_MAX;
}

void StepBatch::reserve_rows(int32_t batch_size, int32_t max_blocks) {
  const bool has_rows = static_cast<size_t>(batch_size) <= row_serials_.size();
  if (has_rows && max_blocks <= block_table_stride_) return;
  const int64_t rows = rows_for(batch_size);
  block_table_stride_ = stride_for(max_blocks);
  row_serials_.assign(rows, 0);
  block_table_ = {};
  block_table_.resize(rows * block_table_stride_);
}

void StepBatch::begin(int64_t ticket, const Size& size) {
  reserve_rows(size.batch_size, size.max_blocks);
  ticket_ = ticket;
  batch_size_ = size.batch_size;
  max_blocks_ = size.max_blocks;
  num_rows_ = 0;
  has_slots_ = size.has_slots;
  seq_lens_.resize(size.batch_size);
  cu_seqlens_q_.resize(size.batch_size + 1);
  cu_seqlens_q_[0] = 0;
  slot_mapping_.resize(size.has_slots ? size.num_new_tokens : 0);
  positions_.resize(size.num_new_tokens);
  copies_.resize(2 * size.num_copies);
  copies_.resize(0);
  changes_.resize(2 * size.num_blocks + 4 * size.batch_size);  // advance() may have two a row
  changes_.resize(0);
}

void StepBatch::write_row(int32_t row, bool is_kept, BlockTable& table, int32_t num_blocks) {
  const int32_t begin = static_cast<int32_t>(row * block_table_stride_);
  int32_t* const entries = block_table_.data() + begin;
  const int32_t first = table.write_row(entries, row, is_kept, num_blocks);
  if (first >= num_blocks) return;
  const size_t size = changes_.size();
  changes_.resize(size + 2 * static_cast<size_t>(num_blocks - first));
  int32_t* change = changes_.data() + size;
  for (int32_t column = first; column < num_blocks; ++column) {
    *change++ = begin + column;
    *change++ = entries[column];
  }
}

void StepBatch::add_row(int64_t serial, BlockTable& table, int64_t first, int64_t end,
                        int64_t reach) {
  const int32_t row = num_rows_++;
  const int32_t num_blocks = table.blocks_for(reach);
  write_row(row, row_serials_[row] == serial, table,
            has_slots_ ? num_blocks : std::min(num_blocks, max_blocks_));
  row_serials_[row] = serial;
  seq_lens_[row] = static_cast<int32_t>(end);
  const int32_t start = cu_seqlens_q_[row] - static_cast<int32_t>(first);
  cu_seqlens_q_[row + 1] = static_cast<int32_t>(end) + start;
  int32_t* const positions = positions_.data() + start;
  int64_t* const slots = slot_mapping_.data() + start;
  for (int64_t position = first; position < end; ++position)
    positions[position] = static_cast<int32_t>(position);
  if (!has_slots_) return;
  for (int64_t position = first; position < end;) {
    const int64_t offset = table.slot(position) - position;
    const int64_t block_end = std::min(end, table.block_end(position));
    for (; position < block_end; ++position) slots[position] = offset + position;
  }
}

void StepBatch::add_copy(int32_t source, int32_t destination) {
  copies_.push_back(source);
  copies_.push_back(destination);
}

void StepBatch::advance(int64_t ticket) {
  ticket_ = ticket;
  copies_.resize(0);
  changes_.resize(0);
  int32_t* const seq_lens = seq_lens_.data();
  int32_t* const positions = positions_.data();
  int64_t* const slots = slot_mapping_.data();
  for (int32_t i = 0; i < batch_size_; ++i) ++seq_lens[i];
  for (int32_t i = 0; i < batch_size_; ++i) ++positions[i];
  for (int32_t i = 0; i < batch_size_; ++i) ++slots[i];
}

void StepBatch::begin_block(int32_t row, BlockTable& table, int32_t block) {
  const int32_t column = table.size();
  if (!table.append_written(block, row)) return rewrite(row, table);
  const int32_t index = static_cast<int32_t>(row * block_table_stride_) + column;
  block_table_[index] = block;
  changes_.push_back(index);
  changes_.push_back(block);
  max_blocks_ = std::max(max_blocks_, column + 1);
  slot_mapping_[row] = table.first_slot(block);
}

void StepBatch::rewrite(int32_t row, BlockTable& table) {
  const int32_t num_blocks = table.blocks_for(seq_lens_[row]);
  max_blocks_ = std::max(max_blocks_, num_blocks);
  write_row(row, true, table, num_blocks);
  slot_mapping_[row] = table.slot(positions_[row]);
}

}  // namespace quire
