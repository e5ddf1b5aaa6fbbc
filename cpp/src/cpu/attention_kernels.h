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
#include "cpu/backward_panels.h"
#include "cpu/backward_task.h"
#include "cpu/backward_kernel.h"
#include "cpu/quantise_kernel.h"
#include "cpu/roof_kernel.h"
// clang-format on

inline void finish_rows(const Task& task, const State& state) {
  with_query_type(task.p, [&]<class T>() {
    for (int r = 0; r < task.rows; ++r) finish_row<T>(task, r, state.seen[r], state.row(r));
  });
}

// The state to its slots for the chunk at `begin`, and cleared for the next one.
inline void store_chunk(const Run& run, const Task& task, const State& state, int64_t begin) {
  const int64_t chunk = (begin - task.item.kv_begin) / kKvChunk;
  const int64_t slot = task.item.partial + chunk * run.slots(task.rows);
  for (int r = 0; r < task.rows; ++r) store_partial(run, task, r, slot, state, r);
  state.clear(task.rows);
}

// Few rows of one sequence, for one kv head or several. T is the type of k and v.
template <class T>
void attend_decode(const Run& run, std::span<const Task> tasks) {
  const Task& first = tasks[0];
  const WorkItem& item = first.item;
  const int stride = value_stride(first);
  const size_t seen_floats = padded(first.rows * sizeof(Seen) / sizeof(float));
  const size_t state_floats = seen_floats + padded(static_cast<size_t>(first.rows) * stride);
  float* scratch =
      thread_scratch(tasks.size() * state_floats + Decode<T>::scratch_floats(first, tasks.size()));
  std::vector<State> states;
  for (size_t i = 0; i < tasks.size(); ++i) {
    float* memory = scratch + i * state_floats;
    states.push_back({reinterpret_cast<Seen*>(memory), memory + seen_floats, stride});
    states[i].clear(first.rows);
  }
  Decode<T> kernel(tasks, scratch + tasks.size() * state_floats);
  for (int64_t begin = item.kv_begin; begin < item.kv_end; begin += kKvChunk) {
    kernel.chunk(begin, std::min<int64_t>(begin + kKvChunk, item.kv_end), states.data());
    if (item.partial < 0) continue;
    for (size_t i = 0; i < tasks.size(); ++i) store_chunk(run, tasks[i], states[i], begin);
  }
  if (item.partial >= 0) return;
  for (size_t i = 0; i < tasks.size(); ++i) finish_rows(tasks[i], states[i]);
}

template <class T>
void attend_prefill(const Run& run, const Task& task) {
  using Kernel = Prefill<T>;
  const int rows = Kernel::padded_rows(task.rows), stride = value_stride(task);
  const size_t seen_floats = padded(rows * sizeof(Seen) / sizeof(float));
  const size_t value_floats = padded(static_cast<size_t>(rows) * stride);
  float* scratch = thread_scratch(seen_floats + value_floats + Kernel::scratch_floats(task));
  const State state{reinterpret_cast<Seen*>(scratch), scratch + seen_floats, stride};
  Kernel kernel(task, scratch + seen_floats + value_floats);
  const WorkItem& item = task.item;
  state.clear(rows);
  for (int64_t begin = item.kv_begin; begin < item.kv_end; begin += kKvChunk) {
    kernel.chunk(begin, std::min<int64_t>(begin + kKvChunk, item.kv_end), state);
    if (item.partial >= 0) store_chunk(run, task, state, begin);
  }
  if (item.partial < 0) finish_rows(task, state);
}

// T is the type of k and v.
template <class T>
void attend_as(const Run& run, std::span<const WorkItem> unit) {
  std::vector<Task> few, many;  // the kernel of a row depends on its sequence alone
  for (const WorkItem& item : unit) {
    const Task task(run.params, item);
    (is_decode(task) ? few : many).push_back(task);
  }
  const bool is_shared = unit.size() > 1 && unit[0].kv_head == unit[1].kv_head;
  if (is_shared && !few.empty()) SharedDecode<T>(run, few).attend();
  for (size_t i = 0, count; !is_shared && i < few.size(); i += count) {
    count = std::min(few.size() - i, Decode<T>::most_heads(few[i]));
    attend_decode<T>(run, std::span(few).subspan(i, count));
  }
  if (is_shared && !many.empty()) return attend_shared_prefill<T>(run, many);
  for (const Task& task : many) attend_prefill<T>(run, task);
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
