// SPDX-License-Identifier: Apache-2.0
// Items of many sequences that read the same chunks of keys: K and V are read once for all of
// them. Rows go through the arithmetic of their own kernel, decode or prefill, in its order, so
// that sharing changes no bit; each chunk's result goes to the row's slot, for its merge to fold.
// Every row sees every key of these chunks. Included inside the namespace of the tier.
#pragma once

constexpr int kSharedTile = 6;   // rows of a register tile
constexpr int kSharedKeys = 32;  // a visit of the values: they stay in the L1 cache

// f.operator()<R>() for the next `count` rows: R are computed, kSharedTile at most.
template <class F>
QUIRE_INLINE void with_shared_rows(int count, F f) {
  if (count > kTileRows) return f.template operator()<kSharedTile>();
  with_rows(count, f);
}

// Logits s of `count` rows of q for a chunk of keys as floats, both [...][stride].
inline void score_floats(const float* q, int count, const float* k, int stride, int dim, float* s,
                         int s_stride) {
  const float* rows[kVisitKeys];
  for (int t = 0; t < kKvChunk; t += kVisitKeys) {
    for (int j = 0; j < kVisitKeys; ++j) rows[j] = k + static_cast<int64_t>(t + j) * stride;
    for (int r = 0; r < count; r += kSharedTile)
      with_shared_rows(count - r, [&]<int R>() {
        dot_rows<R, false>(q + static_cast<int64_t>(r) * stride, stride,
                           Rows<float>{rows, 0, kVisitKeys, 0}, dim, s + r * s_stride + t,
                           s_stride);
      });
  }
}

// Adds to `count` rows of sums a chunk of values as floats, [...][sums.stride], by their weights.
inline void weigh_floats(const float* weights, int weight_stride, int count, const float* v,
                         int dim, const Sums& sums) {
  const float* rows[kSharedKeys];
  for (int t = 0; t < kKvChunk; t += kSharedKeys) {
    for (int j = 0; j < kSharedKeys; ++j) rows[j] = v + static_cast<int64_t>(t + j) * sums.stride;
    for (int r = 0; r < count; r += kSharedTile)
      with_shared_rows(count - r, [&]<int R>() {
        weigh_rows<R, false>(weights + r * weight_stride + t, weight_stride,
                             Rows<float>{rows, 0, kSharedKeys, 0}, dim, {sums.row(r), sums.stride});
      });
  }
}

// Rows of sequences that decode. There are many together, so the work is arithmetic: keys are
// widened to float once a chunk, and register tiles are as large as the registers allow.
template <class T>
class SharedDecode {
 public:
  SharedDecode(const Run& run, std::span<const Task> tasks) : run_(run), first_(tasks[0]) {
    for (const Task& task : tasks)
      for (int r = 0; r < task.rows; ++r) rows_.push_back({&task, r});
    const size_t num_rows = (rows_.size() + kSharedTile - 1) / kSharedTile * kSharedTile;
    q_ = thread_scratch(num_rows * q_stride() + kRowsAtOnce * (kScores + v_stride()) +
                        kKvChunk * (q_stride() + v_stride()));
    s_ = q_ + num_rows * q_stride();
    values_ = s_ + kRowsAtOnce * kScores;
    k_ = values_ + kRowsAtOnce * v_stride();
    v_ = k_ + kKvChunk * q_stride();
    std::fill_n(q_, num_rows * q_stride(), 0.0f);
    const float scale = first_.q_scale() * item_scale<T>(first_, first_.p.k_scale);
    for (size_t i = 0; i < rows_.size(); ++i) {
      load_query(*rows_[i].task, rows_[i].index, scale, q_ + i * q_stride());
      to_loaded_order<T>(q_ + i * q_stride(), first_.p.head_dim);
    }
  }

  void attend() {
    const WorkItem& item = first_.item;
    for (int64_t begin = item.kv_begin; begin < item.kv_end; begin += kKvChunk) {
      const T* from[kKvChunk];
      first_.k_rows(begin, begin + kKvChunk, from);
      widen(from, first_.p.head_dim, k_, q_stride());
      first_.v_rows(begin, begin + kKvChunk, from);
      widen(from, first_.p.head_dim_v, v_, v_stride());
      for (size_t i = 0; i < rows_.size(); i += kRowsAtOnce)
        chunk(begin, i, static_cast<int>(std::min<size_t>(kRowsAtOnce, rows_.size() - i)));
    }
  }

 private:
  struct Row {
    const Task* task;
    int index;
  };
  static constexpr int kRowsAtOnce = 2 * kSharedTile;
  static constexpr int kScores = kKvChunk + 16;
  static constexpr int kAhead = 32;  // keys from use to prefetch

  size_t q_stride() const { return padded(first_.p.head_dim); }
  size_t v_stride() const { return padded(first_.p.head_dim_v); }
  static int whole_vectors(int dim) { return (dim + kWidth - 1) / kWidth * kWidth; }

  // The rows of a chunk as floats in loaded order, zeros behind them.
  static void widen(const T* const* from, int dim, float* to, size_t stride) {
    for (int key = 0; key < kKvChunk; ++key, to += stride) {
      const T* next = from[std::min(key + kAhead, kKvChunk - 1)];
      for (size_t byte = 0; byte < dim * sizeof(T); byte += 64)
        prefetch_far(reinterpret_cast<const char*>(next) + byte);
      int d = 0;
      for (; d + 2 * kWidth <= dim; d += 2 * kWidth) {
        Vec pair[2];
        load2(from[key] + d, pair);
        store(to + d, pair[0]);
        store(to + d + kWidth, pair[1]);
      }
      for (; d + kWidth <= dim; d += kWidth) store(to + d, load(from[key] + d));
      if (d < dim) store(to + d, load(from[key] + d, dim - d));
    }
  }

  // `count` rows from `i` on against the widened chunk.
  void chunk(int64_t begin, size_t i, int count) {
    const int64_t end = begin + kKvChunk;
    score_floats(q_ + i * q_stride(), count, k_, static_cast<int>(q_stride()),
                 whole_vectors(first_.p.head_dim), s_, kScores);
    scale_tokens<T>(first_, first_.p.k_scale, begin, end, s_, count, kScores);
    Seen seen[kRowsAtOnce];
    const State state{seen, values_, static_cast<int>(v_stride())};
    state.clear(kRowsAtOnce);
    for (int r = 0; r < count; ++r)
      seen[r] =
          softmax_row(*rows_[i + r].task, rows_[i + r].index, begin, s_ + r * kScores, 0, kKvChunk);
    scale_tokens<T>(first_, first_.p.v_scale, begin, end, s_, count, kScores);
    weigh_floats(s_, kScores, count, v_, whole_vectors(first_.p.head_dim_v),
                 {state.values, state.stride});
    if (kIsQuantised<T>) scale_values(count);
    for (int r = 0; r < count; ++r) {
      const auto& [task, index] = rows_[i + r];
      from_loaded_order<T>(state.row(r), first_.p.head_dim_v);
      const int64_t chunks_before = (begin - task->item.kv_begin) / kKvChunk;
      store_partial(run_, *task, index, task->item.partial + chunks_before * run_.slots(task->rows),
                    state, r);
    }
  }

  void scale_values(int count) {
    const float scale = item_scale<T>(first_, first_.p.v_scale);
    for (size_t i = 0; i < count * v_stride(); ++i) values_[i] *= scale;
  }

  const Run& run_;
  const Task& first_;      // whose keys are read
  std::vector<Row> rows_;  // of all tasks
  float* q_;               // [whole tiles][q_stride], scaled
  float* s_;               // [kRowsAtOnce][kScores]: logits of a chunk, then weights
  float* values_;          // [kRowsAtOnce][v_stride]
  float* k_;               // [kKvChunk][q_stride]
  float* v_;               // [kKvChunk][v_stride]
};

// Rows of longer sequences: each chunk is packed once.
template <class T>
void attend_shared_prefill(const Run& run, std::span<const Task> tasks) {
  using Kernel = Prefill<T>;
  const Task& widest = *std::max_element(
      tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.rows < b.rows; });
  const int rows = Kernel::padded_rows(widest.rows), stride = value_stride(widest);
  const size_t state_floats = padded(static_cast<size_t>(rows) * stride);
  float* scratch = thread_scratch(state_floats + Kernel::scratch_floats(widest));
  std::vector<Seen> seen(rows);
  const State state{seen.data(), scratch, stride};
  int64_t chunk = 0;
  const WorkItem& item = tasks[0].item;
  for (int64_t begin = item.kv_begin; begin < item.kv_end; begin += kKvChunk, ++chunk) {
    bool is_packed = false;
    for (const Task& task : tasks) {
      Kernel kernel(task, scratch + state_floats);
      if (!std::exchange(is_packed, true)) kernel.pack(begin, 0, kKvChunk);
      state.clear(Kernel::padded_rows(task.rows));
      kernel.fold_packed(begin, kKvChunk, state);
      const int64_t slot = task.item.partial + chunk * run.slots(task.rows);
      for (int r = 0; r < task.rows; ++r) store_partial(run, task, r, slot, state, r);
    }
  }
}
