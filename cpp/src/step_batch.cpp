// SPDX-License-Identifier: Apache-2.0
#include "quire/step_batch.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace quire {

namespace {

// first, first + 1, ... In vectors: compilers make more of short loops like this than they gain.
template <class T>
void write_numbers(T* out, T first, int64_t count) {
  constexpr int64_t kLanes = 16 / sizeof(T);
  typedef T Vector __attribute__((vector_size(16)));
  Vector numbers;
  for (int64_t k = 0; k < kLanes; ++k) numbers[k] = first + static_cast<T>(k);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes, numbers += static_cast<T>(kLanes))
    std::memcpy(out + i, &numbers, sizeof(numbers));
  for (; i < count; ++i) out[i] = first + static_cast<T>(i);
}

}  // namespace

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

bool StepBatch::fits_table(const Size& size) const {
  return static_cast<size_t>(size.batch_size) <= row_serials_.size() &&
         size.max_blocks <= block_table_stride_;
}

void StepBatch::reserve(const Size& size) {
  seq_lens_.reserve(size.batch_size);
  cu_seqlens_q_.reserve(size.batch_size + 1);
  slot_mapping_.reserve(size.has_slots ? size.num_new_tokens : 0);
  positions_.reserve(size.num_new_tokens);
  copies_.reserve(2 * size.num_copies);
  changed_.reserve(size.batch_size);
  changes_.reserve(2 * size.num_entries);  // at most: every row anew
  if (fits_table(size)) return;
  const int64_t rows = rows_for(size.batch_size);
  next_serials_.assign(rows, 0);
  next_table_.resize(rows * stride_for(size.max_blocks));
}

void StepBatch::begin(int64_t ticket, const Size& size) {
  reserve(size);
  if (!fits_table(size)) {
    block_table_stride_ = stride_for(size.max_blocks);
    // Swapped, which allocates nothing: the next larger table is never the memory of this one.
    std::swap(row_serials_, next_serials_);
    std::swap(block_table_, next_table_);
  }
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
  copies_.resize(0);
  forget_changes();
}

void StepBatch::reserve_changes(size_t count) {
  changed_.reserve(count);
  changes_.reserve(2 * count);
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

const StepArray<int32_t>& StepBatch::changes() const noexcept {
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
    const int32_t num_moved = std::min(table.num_written(), num_blocks);
    std::copy_n(block_table_.data() + before * block_table_stride_, num_moved, entries);
    table.note_moved(row, num_moved);
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
  if (end == first + 1) {
    positions[first] = static_cast<int32_t>(first);
    if (has_slots_) slots[first] = table.slot(first);
    return;
  }
  write_numbers(positions + first, static_cast<int32_t>(first), end - first);
  for (int64_t position = first; has_slots_ && position < end;) {
    const int64_t count = table.left_in_block(position, end);
    write_numbers(slots + position, table.slot(position), count);
    position += count;
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
