// SPDX-License-Identifier: Apache-2.0
// A unit of work from end to end: chunk after chunk through the kernel for its sequence, then out
// and lse; where keys are split or shared, each chunk's result goes to its slot instead, and a
// merge folds those.
// Included inside the namespace of the tier, after simd_*.h.
#pragma once

// clang-format off: each builds on those before
#include "cpu/vector_math.h"
#include "cpu/task.h"
#include "cpu/query.h"
#include "cpu/scales.h"
#include "cpu/softmax.h"
#include "cpu/words.h"
#include "cpu/decode.h"
#include "cpu/prefill.h"
#include "cpu/shared.h"
#include "cpu/backward_kernel.h"
#include "cpu/roof_kernel.h"
// clang-format on

template <class Kernel>
void attend_with(const Run& run, const Task& task) {
  const int rows = Kernel::padded_rows(task.rows);
  const int stride = value_stride(task);
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
    for (int r = 0; r < task.rows; ++r) store_partial(run, task, r, slot, state, r);
    slot += run.slots(task.rows);
    state.clear(rows);
  }
  if (item.partial >= 0) return;
  with_query_type(task.p, [&]<class T>() {
    for (int r = 0; r < task.rows; ++r) finish_row<T>(task, r, state.seen[r], state.row(r));
  });
}

// T is the type of k and v.
template <class T>
void attend_as(const Run& run, std::span<const WorkItem> unit) {
  if (unit.size() > 1) return attend_shared<T>(run, unit);
  const Task task(run.params, unit[0]);
  if (is_decode(task))
    attend_with<Decode<T>>(run, task);
  else
    attend_with<Prefill<T>>(run, task);
}

// T is the type of out.
template <class T>
void merge_as(const Run& run, const MergeItem& merge) {
  const WorkItem item{merge.sequence, merge.kv_head, merge.q_begin, merge.q_end, 0, 0, -1, -1};
  const Task task(run.params, item);
  const int dim = task.p.head_dim_v;
  float* values = thread_scratch(dim);
  const int64_t slots = run.slots(task.rows);
  for (int r = 0; r < task.rows; ++r) {
    Seen seen;
    std::fill_n(values, dim, 0.0f);
    for (int i = 0; i < merge.num_partials; ++i) {
      const float* partial = run.partial(merge.partial + i * slots, r);
      fold_values(values, partial + 2, dim, fold(seen, {partial[0], partial[1]}));
    }
    finish_row<T>(task, r, seen, values);
  }
}

inline void attend(const Run& run, std::span<const WorkItem> unit) {
  switch (run.params.kv_dtype) {
    case ElementType::kFloat32:
      return attend_as<float>(run, unit);
    case ElementType::kFloat16:
      return attend_as<Float16>(run, unit);
    case ElementType::kBFloat16:
      return attend_as<BFloat16>(run, unit);
    case ElementType::kFloat8E4M3:
      return attend_as<Float8E4M3>(run, unit);
    case ElementType::kFloat8E5M2:
      return attend_as<Float8E5M2>(run, unit);
    case ElementType::kInt8:
      return attend_as<Int8>(run, unit);
  }
}

inline void merge(const Run& run, const MergeItem& item) {
  with_query_type(run.params, [&]<class T>() { merge_as<T>(run, item); });
}
