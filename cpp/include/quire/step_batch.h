// SPDX-License-Identifier: Apache-2.0
// StepBatch: the arrays of one step that attention and cache operations read.
//
// One StepBatch serves every step. Row i remembers whose block table it holds, so a decode step
// writes only what changed. Everything is valid until the next step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "quire/block_table.h"

namespace quire {

// An array that is refilled again and again. Growing moves to new memory and loses the contents;
// whoever holds `owner()` keeps the memory it has seen.
template <class T>
class StepArray {
 public:
  T* data() const { return data_.get(); }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data_[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }
  const std::shared_ptr<T[]>& owner() const { return data_; }

  void resize(size_t size) {
    if (size > capacity_) {
      data_ = std::make_shared<T[]>(size + size / 2);
      capacity_ = size + size / 2;
    }
    size_ = size;
  }
  void reserve(size_t size) {  // keeps the contents
    if (size <= capacity_) return;
    std::shared_ptr<T[]> data = std::make_shared<T[]>(size + size / 2);
    std::copy(begin(), end(), data.get());
    data_ = std::move(data);
    capacity_ = size + size / 2;
  }
  void push_back(T value) {  // within what resize() has made room for
    data_[size_++] = value;
  }

 private:
  std::shared_ptr<T[]> data_ = std::make_shared<T[]>(1);
  size_t size_ = 0;
  size_t capacity_ = 1;
};

class StepBatch {
 public:
  int64_t ticket() const { return ticket_; }  // of the step: 1, 2, ...
  int32_t batch_size() const { return batch_size_; }
  int32_t max_blocks() const { return max_blocks_; }                  // columns in use
  int64_t block_table_stride() const { return block_table_stride_; }  // elements from row to row

  // [batch, max_blocks]: row i is valid as far as seq_lens[i] and the step's lookahead reach;
  // beyond that it holds ids of no meaning.
  const StepArray<int32_t>& block_table() const { return block_table_; }
  const StepArray<int32_t>& seq_lens() const { return seq_lens_; }          // [batch], new ones too
  const StepArray<int32_t>& cu_seqlens_q() const { return cu_seqlens_q_; }  // [batch + 1]
  const StepArray<int64_t>& slot_mapping() const { return slot_mapping_; }  // [total_q]
  const StepArray<int32_t>& positions() const { return positions_; }        // [total_q]
  // [copies, 2]: whole blocks (source, destination) to copy before any KV of the step is written.
  const StepArray<int32_t>& copies() const { return copies_; }
  // [changes, 2]: entries of block_table that this step wrote, (row * stride + column, block id).
  // A copy of the table that had all changes so far is up to date with these, unless the stride
  // or the memory of block_table is another than before: then all entries in use are here.
  // Listed when first asked for, in memory that the step has taken.
  const StepArray<int32_t>& changes() const noexcept;

  // What begin() makes room for.
  struct Size {
    int32_t batch_size = 0;
    int32_t max_blocks = 0;
    int64_t num_new_tokens = 0;
    int64_t num_copies = 0;
    int64_t num_entries = 0;  // of block_table in use, all rows'
    bool has_slots = true;    // false: rows of at most max_blocks blocks, and no slot_mapping
  };

  int32_t num_rows_reserved() const { return static_cast<int32_t>(row_serials_.size()); }
  bool may_hold(const Size& size) const;  // less than 2^31 entries, which `changes` numbers

  // Filled by KVCacheManager: begin(), then each row in order, then each copy. After reserve() of
  // the same size none of these throws, and until then everything is as it was.
  void reserve(const Size& size);
  void begin(int64_t ticket, const Size& size);
  // `serial` names the sequence; its tokens [first, end) are new, and its row reaches to token
  // `reach`, at or behind end.
  void add_row(int64_t serial, BlockTable& table, int64_t first, int64_t end, int64_t reach);
  void add_copy(int32_t source, int32_t destination);

  // Or, where the rows are those of the step before and each has one new token behind its last:
  // advance(), then begin_block() of each row whose new token begins one, the row's `column`th, and
  // replace_block() of each whose latest but this is another than before.
  // reserve_changes() makes room for what these write; then none throws.
  void reserve_changes(size_t count);
  void advance(int64_t ticket);
  void begin_block(int32_t row, int32_t column, int32_t block, int64_t first_slot);
  void replace_block(int32_t row, int32_t column, int32_t block);
  void prefetch(int32_t row, int32_t column) const {
    __builtin_prefetch(block_table_.data() + row * block_table_stride_ + column, 1);
  }

 private:
  int64_t stride_for(int32_t max_blocks) const;
  int64_t rows_for(int32_t batch_size) const;
  bool fits_table(const Size& size) const;
  void write_row(int32_t row, int64_t serial, BlockTable& table, int32_t num_blocks);
  void forget_changes();
  void add_changes(int32_t first, int32_t count);

  struct Run {  // of entries of block_table
    int32_t first, count;
  };

  int64_t ticket_ = 0;
  int32_t batch_size_ = 0;
  int32_t max_blocks_ = 0;
  int32_t num_rows_ = 0;  // added so far
  bool has_slots_ = true;
  int64_t block_table_stride_ = 0;
  std::vector<int64_t> row_serials_;  // whose table each row of block_table holds, 0: nobody's
  StepArray<int32_t> block_table_, seq_lens_, cu_seqlens_q_, positions_, copies_;
  StepArray<int32_t> next_table_;      // reserved: a larger one,
  std::vector<int64_t> next_serials_;  // and its rows
  std::vector<Run> changed_;           // by this step
  int64_t num_changed_ = 0;            // entries of these runs
  mutable StepArray<int32_t> changes_;
  StepArray<int64_t> slot_mapping_;
};

}  // namespace quire
