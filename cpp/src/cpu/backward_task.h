// SPDX-License-Identifier: Apache-2.0
// What backward_kernel.h works on: the rows of one sequence and kv head, tile by tile of
// kBackwardRows, against chunks of kBackwardKeys keys. Included inside the namespace of the tier.
#pragma once

// The keys that one row of a tile sees: [begin, end) of the chunk.
struct KeyRange {
  int begin, end;
};

// The rows of one sequence and kv head, and which keys they see.
template <class T>
struct BackwardTask {
  const BackwardRun& run;
  const BackwardHead& head;
  WorkItem item;  // all rows
  Task task;

  BackwardTask(const BackwardRun& run_, const BackwardHead& head_)
      : run(run_),
        head(head_),
        item{head_.sequence,
             head_.kv_head,
             0,
             run_.params.forward.sequences[head_.sequence].q_len,
             0,
             0,
             -1,
             -1},
        task(run_.params.forward, item) {}

  int end_row(int tile) const { return std::min((tile + 1) * kBackwardRows, task.rows); }
  // Chunks [first, last] hold the keys that rows of a tile see; none if first > last.
  int first_chunk(int tile) const {
    return static_cast<int>(task.first_key(tile * kBackwardRows) / kBackwardKeys);
  }
  int last_chunk(int tile) const {
    const int64_t begin = task.first_key(tile * kBackwardRows);
    const int64_t end = task.end_key(end_row(tile) - 1);
    return begin < end ? static_cast<int>((end - 1) / kBackwardKeys) : -1;
  }
  // Of a chunk that begins with key `first`.
  KeyRange keys_of_row(int row, int64_t first) const {
    const int begin =
        static_cast<int>(std::clamp<int64_t>(task.first_key(row) - first, 0, kBackwardKeys));
    const int end =
        static_cast<int>(std::clamp<int64_t>(task.end_key(row) - first, begin, kBackwardKeys));
    return {begin, end};
  }
  const T* dout_row(int row) const {
    const BackwardParams& p = run.params;
    return row_of(static_cast<const T*>(p.dout), p.dout_stride_seq, p.dout_stride_row,
                  p.dout_stride_head, row);
  }
  T* dq_row(int row) const {
    const BackwardParams& p = run.params;
    return row_of(static_cast<T*>(p.dq), p.dq_stride_seq, p.dq_stride_row, p.dq_stride_head, row);
  }
  // Where dq of a row is summed up.
  float* dq_sums(int row) const {
    if constexpr (std::is_same_v<T, float>)
      return dq_row(row);
    else
      return run.dq + (head.first_row + row) * run.params.forward.head_dim;
  }

 private:
  template <class U>
  U* row_of(U* base, int64_t seq, int64_t row_stride, int64_t head_stride, int row) const {
    return base + head.sequence * seq + (task.sequence.q_begin + task.query(row)) * row_stride +
           task.head(row) * head_stride;
  }
};
