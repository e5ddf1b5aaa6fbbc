// SPDX-License-Identifier: Apache-2.0
// A work item with what kernels derive from it: its rows (query rows x heads of one kv head), the
// keys that each sees, and where q, k, v and out lie. Included inside the namespace of the tier.
#pragma once

struct Task {
  const AttentionParams& p;
  const WorkItem& item;
  const Sequence& sequence;
  int group;  // query heads of the kv head
  int rows;   // row r: query item.q_begin + r / group, head kv_head * group + r % group

  Task(const AttentionParams& params, const WorkItem& work_item)
      : p(params),
        item(work_item),
        sequence(params.sequences[work_item.sequence]),
        group(params.num_heads / params.num_kv_heads),
        rows((work_item.q_end - work_item.q_begin) * group) {}

  int64_t query(int row) const { return item.q_begin + row / group; }
  int head(int row) const { return item.kv_head * group + row % group; }
  int64_t position(int row) const {  // the key that the query is aligned to
    return int64_t{sequence.seq_len} - sequence.q_len + query(row);
  }
  // Keys [first_key, end_key) are within causality and window of a row. Both rise with the row.
  int64_t first_key(int row) const {
    return p.window_left < 0 ? 0 : std::max<int64_t>(0, position(row) - p.window_left);
  }
  int64_t end_key(int row) const {
    if (p.window_right < 0) return sequence.seq_len;
    return std::clamp<int64_t>(position(row) + p.window_right + 1, 0, sequence.seq_len);
  }
  bool is_plain() const { return !(p.softcap > 0) && !p.alibi_slopes && !p.mask; }
  // q is multiplied by this; plain logits are then in base 2 already.
  float q_scale() const { return is_plain() ? p.scale * kLog2E : p.scale; }

  template <class T>
  const T* q_row(int row) const {
    return static_cast<const T*>(p.q) + item.sequence * p.q_stride_seq +
           (sequence.q_begin + query(row)) * p.q_stride_row + head(row) * p.q_stride_head;
  }
  template <class T>
  T* out_row(int row) const {
    return static_cast<T*>(p.out) + item.sequence * p.out_stride_seq +
           (sequence.q_begin + query(row)) * p.out_stride_row + head(row) * p.out_stride_head;
  }
  float* lse(int row) const {
    return p.lse + item.sequence * p.lse_stride_seq +
           (sequence.q_begin + query(row)) * p.lse_stride_row + head(row) * p.lse_stride_head;
  }
  const uint8_t* mask_row(int row) const {
    return p.mask + item.sequence * p.mask_stride_seq +
           (sequence.q_begin + query(row)) * p.mask_stride_row;
  }

  // Where k of keys [begin, end) lies.
  template <class T>
  void k_rows(int64_t begin, int64_t end, const T** out) const {
    find_rows(static_cast<const T*>(p.k) + item.sequence * p.k_stride_seq +
                  item.kv_head * p.k_stride_head,
              p.k_stride_block, p.k_stride_row, begin, end, out);
  }
  template <class T>
  void v_rows(int64_t begin, int64_t end, const T** out) const {
    find_rows(static_cast<const T*>(p.v) + item.sequence * p.v_stride_seq +
                  item.kv_head * p.v_stride_head,
              p.v_stride_block, p.v_stride_row, begin, end, out);
  }

 private:
  // Walks block by block: a division for each key would cost as much as the key.
  template <class T>
  void find_rows(const T* base, int64_t stride_block, int64_t stride_row, int64_t begin,
                 int64_t end, const T** out) const {
    if (!p.block_table) {
      for (int64_t key = begin; key < end; ++key)
        *out++ = base + (sequence.kv_row + key) * stride_row;
      return;
    }
    const int32_t* table = p.block_table + sequence.kv_row * p.block_table_stride;
    int64_t block = begin / p.block_size, offset = begin % p.block_size;
    for (int64_t key = begin; key < end; ++block, offset = 0) {
      const int64_t count = std::min<int64_t>(end - key, p.block_size - offset);
      const T* row = base + table[block] * stride_block + offset * stride_row;
      for (int64_t i = 0; i < count; ++i) *out++ = row + i * stride_row;
      key += count;
    }
  }
};
