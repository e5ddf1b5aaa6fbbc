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
  forget_changes();
}

void StepBatch::forget_changes() {
  changed_.clear();
  num_changed_ = 0;
  changes_.resize(0);
}

void StepBatch::add_changes(int32_t first, int32_t count) {
  changed_.push_back({first, count});
  num_changed_ += count;
}

const StepArray<int32_t>& StepBatch::changes() const {
  if (changes_.size() == 2 * static_cast<size_t>(num_changed_)) return changes_;
  changes_.resize(2 * static_cast<size_t>(num_changed_));
  int32_t* change = changes_.data();
  for (const Run& run : changed_) {
    for (int32_t entry = run.first; entry < run.first + run.count; ++entry) {
      *change++ = entry;
      *change++ = block_table_[entry];
    }
  }
  return changes_;
}

// A sequence moves to an earlier row when one before it leaves the batch. What its later row still
// holds is copied from there: that memory is about to be written anyway, the table's own is not.
void StepBatch::write_row(int32_t row, int64_t serial, BlockTable& table, int32_t num_blocks) {
  const int32_t begin = static_cast<int32_t>(row * block_table_stride_);
  int32_t* const entries = block_table_.data() + begin;
  const int32_t before = table.row();
  const bool is_kept = before >= row && row_serials_[before] == serial;
  const bool is_moved = is_kept && before > row;
  if (is_moved) {
    std::copy_n(block_table_.data() + before * block_table_stride_, table.num_written(), entries);
    table.note_moved(row);
  }
  const int32_t written = table.write_row(entries, row, is_kept, num_blocks);
  const int32_t first = is_moved ? 0 : written;
  row_serials_[row] = serial;
  if (first < num_blocks) add_changes(begin + first, num_blocks - first);
}

void StepBatch::add_row(int64_t serial, BlockTable& table, int64_t first, int64_t end,
                        int64_t reach) {
  const int32_t row = num_rows_++;
  const int32_t num_blocks = table.blocks_for(reach);
  write_row(row, serial, table, has_slots_ ? num_blocks : std::min(num_blocks, max_blocks_));
  seq_lens_[row] = static_cast<int32_t>(end);
  const int32_t start = cu_seqlens_q_[row] - static_cast<int32_t>(first);
  cu_seqlens_q_[row + 1] = static_cast<int32_t>(end) + start;
  int32_t* const positions = positions_.data() + start;
  int64_t* const slots = slot_mapping_.data() + start;
  for (int64_t position = first; position < end; ++position)
    positions[position] = static_cast<int32_t>(position);
  if (!has_slots_) return;
  const int64_t size = table.block_size();
  int32_t index = static_cast<int32_t>(first / size);
  for (int64_t begin = index * size, position = first; position < end; begin += size, ++index) {
    const int64_t offset = table[index] * size - begin;
    const int64_t stop = std::min(end, begin + size);
    for (; position < stop; ++position) slots[position] = offset + position;
  }
}

void StepBatch::add_copy(int32_t source, int32_t destination) {
  copies_.push_back(source);
  copies_.push_back(destination);
}

void StepBatch::advance(int64_t ticket) {
  ticket_ = ticket;
  copies_.resize(0);
  forget_changes();
  int32_t* const seq_lens = seq_lens_.data();
  int32_t* const positions = positions_.data();
  int64_t* const slots = slot_mapping_.data();
  const int32_t count = batch_size_;  // what the arrays cannot alias
  for (int32_t i = 0; i < count; ++i) ++seq_lens[i];
  for (int32_t i = 0; i < count; ++i) ++positions[i];
  for (int32_t i = 0; i < count; ++i) ++slots[i];
}

void StepBatch::begin_block(int32_t row, int32_t column, int32_t block, int64_t first_slot) {
  replace_block(row, column, block);
  max_blocks_ = std::max(max_blocks_, column + 1);
  slot_mapping_[row] = first_slot;
}

void StepBatch::replace_block(int32_t row, int32_t column, int32_t block) {
  const int32_t entry = static_cast<int32_t>(row * block_table_stride_) + column;
  block_table_[entry] = block;
  add_changes(entry, 1);
}

}  // namespace quire
