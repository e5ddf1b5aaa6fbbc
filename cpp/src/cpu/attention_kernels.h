// SPDX-License-Identifier: Apache-2.0
// A work item from end to end: chunk after chunk through the kernel for its sequence, then out and
// lse; where keys are split, each chunk's result goes to its slot instead, and a merge folds those.
// Included inside the namespace of the tier, after simd_*.h.
#pragma once

// clang-format off: each builds on those before
#include "cpu/vector_math.h"
#include "cpu/task.h"
#include "cpu/softmax.h"
#include "cpu/words.h"
#include "cpu/decode.h"
#include "cpu/prefill.h"
#include "cpu/backward_kernel.h"
#include "cpu/roof_kernel.h"
// clang-format on

// Leaves the rows' state over one chunk in its slot.
inline void store_partial(const Run& run, const Task& task, const State& state, int64_t slot) {
  for (int r = 0; r < task.rows; ++r) {
    float* partial = run.partial(slot, r);
    partial[0] = state.seen[r].maximum;
    partial[1] = state.seen[r].sum;
    std::copy_n(state.row(r), task.p.head_dim_v, partial + 2);
  }
}

template <class T, class Kernel>
void attend_with(const Run& run, const Task& task) {
  const int rows = Kernel::padded_rows(task.rows);
  const int stride = (task.p.head_dim_v + 2 * kWidth - 1) / (2 * kWidth) * (2 * kWidth);
  const size_t seen_floats = padded(rows * sizeof(Seen) / sizeof(float));
  const size_t value_floats = padded(static_cast<size_t>(rows) * stride);
  float* scratch = thread_scratch(seen_floats + value_floats + Kernel::scratch_floats(task));
  const State state{reinterpret_cast<Seen*>(scratch), scratch + seen_floats, stride};
  Kernel kernel(task, scratch + seen_floats + value_floats);
  const WorkItem& item = task.item;
  int64_t slot = item.partial;
  state.clear(rows);
  for (int64_t begin = item.kv_begin; begin < item.kv_end; begin += kKvChunk) {
    kernel.chunk(begin, std::min<int64_t>(begin + kKvChunk, item.kv_end), state);
    if (item.partial < 0) continue;
    store_partial(run, task, state, slot++);
    state.clear(rows);
  }
  if (item.partial >= 0) return;
  for (int r = 0; r < task.rows; ++r) finish_row<T>(task, r, state.seen[r], state.row(r));
}

template <class T>
void attend_as(const Run& run, const WorkItem& item) {
  const Task task(run.params, item);
  if (int64_t{task.sequence.q_len} * task.group <= kDecodeRows)
    attend_with<T, Decode<T>>(run, task);
  else
    attend_with<T, Prefill<T>>(run, task);
}

template <class T>
void merge_as(const Run& run, const MergeItem& merge) {
  const WorkItem item{merge.sequence, merge.kv_head, merge.q_begin, merge.q_end, 0, 0, -1, -1};
  const Task task(run.params, item);
  const int dim = task.p.head_dim_v;
  float* values = thread_scratch(dim);
  for (int r = 0; r < task.rows; ++r) {
    Seen seen;
    std::fill_n(values, dim, 0.0f);
    for (int i = 0; i < merge.num_partials; ++i) {
      const float* partial = run.partial(int64_t{merge.partial} + i, r);
      fold_values(values, partial + 2, dim, fold(seen, {partial[0], partial[1]}));
    }
    finish_row<T>(task, r, seen, values);
  }
}

// f.operator()<T>() for the element type of the run.
template <class F>
void with_element(const Run& run, F f) {
  switch (run.params.dtype) {
    case ElementType::kFloat32:
      return f.template operator()<float>();
    case ElementType::kFloat16:
      return f.template operator()<Float16>();
    case ElementType::kBFloat16:
      return f.template operator()<BFloat16>();
  }
}

inline void attend(const Run& run, const WorkItem& item) {
  with_element(run, [&]<class T>() { attend_as<T>(run, item); });
}

inline void merge(const Run& run, const MergeItem& item) {
  with_element(run, [&]<class T>() { merge_as<T>(run, item); });
}
