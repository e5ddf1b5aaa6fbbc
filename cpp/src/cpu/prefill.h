// SPDX-License-Identifier: Apache-2.0
// Many rows: bound by arithmetic, so both products run as register-tiled matrix products over
// keys that are packed once a chunk and item, K transposed, into panels of words (words.h) that
// are read in the order of use. Included inside the namespace of the tier.
#pragma once

static_assert(kKvChunk % kPanel == 0);

// finish(i, sums) for M rows i of a[M][depth] * b[depth][kPanel], sums being two vectors.
template <int M, class W, class Finish>
QUIRE_INLINE void multiply_tile(const float* a, int a_stride, const float* b, int depth,
                                Finish finish) {
  Vec sums[M][2];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) sums[i][0] = sums[i][1] = zero();
  for (int k = 0; k < depth; ++k, b += kPanel) {
    const Vec b0 = load(b), b1 = load(b + kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      sums[i][0] = W::multiply_add(a + i * a_stride + k, b0, sums[i][0]);
      sums[i][1] = W::multiply_add(a + i * a_stride + k, b1, sums[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) finish(i, sums[i]);
}

// s = q * k for M rows and one panel of keys.
template <int M, class W>
void score_tile(const float* q, int depth, const float* panel, float scale, float* s,
                int s_stride) {
  multiply_tile<M, W>(q, depth, panel, depth, [&](int i, const Vec(&sums)[2]) {
    for (int j = 0; j < 2; ++j)
      store(s + i * s_stride + j * kWidth, W::kScalesLogits ? mul(sums[j], set(scale)) : sums[j]);
  });
}

// values = fold(values, weights * v) for M rows and one panel of columns.
template <int M, class W>
void weigh_panel(const float* weights, int weight_stride, const float* panel, int depth,
                 const Fold* folds, float* values, int stride) {
  multiply_tile<M, W>(weights, weight_stride, panel, depth, [&](int i, const Vec(&sums)[2]) {
    float* to = values + static_cast<int64_t>(i) * stride;
    store(to, folds[i](load(to), sums[0]));
    store(to + kWidth, folds[i](load(to + kWidth), sums[1]));
  });
}

template <class T>
class Prefill {
 public:
  static int padded_rows(int rows) { return (rows + W::kRows - 1) / W::kRows * W::kRows; }
  static size_t scratch_floats(const Task& task) {
    return padded(static_cast<size_t>(padded_rows(task.rows)) * depth_of(task)) +
           W::kRows * kScores + kKvChunk * (depth_of(task) + value_panels(task) * kPanel);
  }

  Prefill(const Task& task, float* scratch)
      : task_(task),
        depth_(static_cast<int>(depth_of(task))),
        s_(scratch),
        k_(s_ + W::kRows * kScores),
        v_(k_ + static_cast<size_t>(kKvChunk) * depth_),
        q_(v_ + kKvChunk * value_panels(task) * kPanel),
        first_key_(task.first_key(0)),
        end_key_(task.end_key(task.rows - 1)) {
    for (int r = 0; r < task.rows; ++r) pack_query(r);
    std::fill(q_row(task.rows), q_row(padded_rows(task.rows)), 0.0f);
  }

  // Adds the chunk of keys [begin, end) to the state.
  void chunk(int64_t begin, int64_t end, const State& state) {
    const int first = static_cast<int>(std::max(begin, first_key_) - begin);
    const int last = static_cast<int>(std::min(end, end_key_) - begin);
    if (first >= last) return;
    pack(begin, first, last);
    fold_packed(begin, last, state);
  }

  // Adds the packed keys to the state: those before key `last` of the chunk at `begin`.
  void fold_packed(int64_t begin, int last, const State& state) {
    for (int r = 0; r < task_.rows; r += W::kRows) {
      const int rows = std::min(W::kRows, task_.rows - r);
      if (rows > 2 * W::kRowStep)
        row_tile<W::kRows>(r, rows, begin, last, state);
      else if (rows > W::kRowStep)
        row_tile<2 * W::kRowStep>(r, rows, begin, last, state);
      else
        row_tile<W::kRowStep>(r, rows, begin, last, state);
    }
  }

  // Keys [first, last) of the chunk; others in the same panels become zeros, unread. Quantised ones
  // are packed times their scales: that is done once for all rows of q.
  void pack(int64_t chunk_begin, int first, int last) {
    static constexpr T kZeros[kMaxHeadDim] = {};
    const T* rows[kKvChunk + kWidth];
    float scales[kKvChunk + kWidth];
    std::fill(rows, rows + kKvChunk + kWidth, kZeros);
    task_.k_rows(chunk_begin + first, chunk_begin + last, rows + first);
    find_scales(task_.p.k_scale, chunk_begin, first, last, scales);
    for (int key = first / kPanel * kPanel; key < last; key += kWidth)
      pack_keys(rows + key, scales + key, key);
    task_.v_rows(chunk_begin + first, chunk_begin + last, rows + first);
    find_scales(task_.p.v_scale, chunk_begin, first, last, scales);
    for (int key = first / kStep * kStep; key < round_up(last); key += W::kElements)
      pack_values(rows + key, scales[key], key);
  }

 private:
  using W = Words<T>;
  static constexpr int kScores = kKvChunk + 16;  // rows on different cache sets
  // Elements of a row that are multiplied at a time: of q and k, and keys of weights and v. Pieces
  // are counted from the start of the chunk, whichever keys are seen.
  static constexpr int kStep = W::kDepthStep * W::kElements;
  static_assert(kPanel % kStep == 0);
  static int round_up(int count) { return (count + kStep - 1) / kStep * kStep; }
  static size_t depth_of(const Task& task) {  // words of a row of q and k
    return static_cast<size_t>(round_up(task.p.head_dim) / W::kElements);
  }
  static size_t value_panels(const Task& task) { return (task.p.head_dim_v + kPanel - 1) / kPanel; }

  float* q_row(int r) const { return q_ + static_cast<int64_t>(r) * depth_; }

  void pack_query(int r) const {
    float* to = q_row(r);
    if constexpr (W::kScalesLogits) {
      const T* from = task_.q_row<T>(r);
      for (int w = 0; w < depth_; w += kWidth)
        store(to + w, W::load_words(from + w * W::kElements, task_.p.head_dim - w * W::kElements),
              std::min(kWidth, depth_ - w));
    } else {
      load_query(task_, r, task_.q_scale(), to);
    }
  }

  // scales[i] of key chunk_begin + i, [first, last); anything finite for the others.
  void find_scales(const KvScale& scale, int64_t chunk_begin, int first, int last,
                   float* scales) const {
    std::fill_n(scales, kKvChunk + kWidth, item_scale<T>(task_, scale));
    if (kIsQuantised<T> && scale.is_per_token)
      multiply_token_scales(task_, scale, chunk_begin + first, chunk_begin + last, scales + first);
  }

  void pack_keys(const T* const* rows, const float* scales, int key) {
    float* to = k_ + static_cast<int64_t>(key / kPanel) * depth_ * kPanel + key % kPanel;
    for (int w = 0; w < depth_; w += kWidth) {
      const int d = w * W::kElements;
      Vec x[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        prefetch(rows[i + kWidth] + d);
        x[i] = W::load_words(rows[i] + d, task_.p.head_dim - d);
        if (kIsQuantised<T>) x[i] = mul(x[i], set(scales[i]));
      }
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i)
        if (w + i < depth_) store(to + static_cast<int64_t>(w + i) * kPanel, x[i]);
    }
  }

  void pack_values(const T* const* rows, float scale, int key) {
    const int dim = task_.p.head_dim_v, padded_dim = static_cast<int>(value_panels(task_)) * kPanel;
    constexpr int kDepth = kKvChunk / W::kElements;  // words of a panel's column
    for (int d = 0; d < padded_dim; d += kWidth) {
      const int64_t row = static_cast<int64_t>(d / kPanel) * kDepth + key / W::kElements;
      for (int i = 0; i < W::kElements; ++i) prefetch(rows[kWidth + i] + d);
      Vec x = d < dim ? W::load_columns(rows, d, dim - d) : zero();
      if (kIsQuantised<T>) x = mul(x, set(scale));
      store(v_ + row * kPanel + d % kPanel, x);
    }
  }

  // Rows [r, r + rows) against the packed keys, panels that none of them sees left out.
  template <int M>
  void row_tile(int r, int rows, int64_t chunk_begin, int last, const State& state) {
    const int begin = static_cast<int>(std::max<int64_t>(0, task_.first_key(r) - chunk_begin));
    const int end =
        static_cast<int>(std::min<int64_t>(last, task_.end_key(r + rows - 1) - chunk_begin));
    if (begin >= end) return;
    const int s_begin = begin / kPanel * kPanel, s_end = (end + kPanel - 1) / kPanel * kPanel;
    for (int key = s_begin; key < s_end; key += kPanel)
      score_tile<M, typename W::Products>(q_row(r), depth_, k_ + static_cast<int64_t>(key) * depth_,
                                          task_.q_scale(), s_ + key, kScores);
    Fold folds[M];
    for (int i = 0; i < rows; ++i) {
      float* s = s_ + i * kScores;
      folds[i] = fold(state.seen[r + i], softmax_row(task_, r + i, chunk_begin, s, s_begin, s_end));
      W::pack_weights(s, s_begin, s_end);
    }
    const int first_word = begin / kStep * W::kDepthStep;
    const int words = round_up(end) / W::kElements - first_word;
    for (int d = 0; d < task_.p.head_dim_v; d += kPanel)
      weigh_panel<M, typename W::Products>(
          s_ + first_word, kScores,
          v_ + static_cast<int64_t>(d) * (kKvChunk / W::kElements) + first_word * kPanel, words,
          folds, state.row(r) + d, state.stride);
  }

  [[no_unique_address]] typename W::Unit unit_;
  const Task& task_;
  int depth_;  // words of a row of q and k
  // In the scratch memory those that do not depend on the task's rows come first.
  float* s_;                     // [W::kRows][kScores]: logits, then weights
  float* k_;                     // [kKvChunk / kPanel][depth][kPanel]
  float* v_;                     // [panels][kKvChunk / W::kElements][kPanel]
  float* q_;                     // [rows][depth], scaled unless the logits are
  int64_t first_key_, end_key_;  // seen by any row
};
