// SPDX-License-Identifier: Apache-2.0
// Few rows (decoding, short speculative drafts): bound by reading K and V, so each is read once
// for all rows and widened to float in registers, while keys further on are being fetched: block
// tables defeat the hardware's prefetcher. Included inside the namespace of the tier.
#pragma once

// Sequences with at most this many rows a kv head are computed here. A function of the sequence
// alone: the two kernels add in different orders.
constexpr int kDecodeRows = 16;

inline bool is_decode(const Task& task) {
  return int64_t{task.sequence.q_len} * task.group <= kDecodeRows;
}

constexpr int kTileRows = 4;  // rows of a register tile, of both products
constexpr int kTileKeys = kRegisters == 32 ? 4 : 2;
constexpr int kTileColumns = kRegisters == 32 ? 4 : 2;  // vectors
constexpr int kWeighKeys = 32;                          // keys a visit of the values

// Into the L2 cache: the line buffers of L1 are too few to cover the latency of memory.
QUIRE_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// s[r][t] = q[r] . keys[t] for R rows and kTileKeys keys; q is padded with zeros.
template <int R, class T>
QUIRE_INLINE void dot_tile(const float* q, int q_stride, const T* const* keys, int dim, float* s,
                           int s_stride) {
  constexpr int kSums = R * kTileKeys;
  Vec acc[(kSums + 3) / 4 * 4];
#pragma GCC unroll 32
  for (Vec& a : acc) a = zero();
  // C vectors from d on.
  const auto step = [&]<int C>(int d, auto load_key) {
    Vec k[kTileKeys][C];
#pragma GCC unroll 4
    for (int t = 0; t < kTileKeys; ++t) load_key(keys[t] + d, k[t]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const Vec x = in_register(load(q + r * q_stride + d + c * kWidth));
#pragma GCC unroll 4
        for (int t = 0; t < kTileKeys; ++t)
          acc[r * kTileKeys + t] = fma(x, k[t][c], acc[r * kTileKeys + t]);
      }
  };
  int d = 0;
  for (; d + 2 * kWidth <= dim; d += 2 * kWidth)
    step.template operator()<2>(d, [](const T* p, Vec* v) { load2(p, v); });
  for (; d < dim; d += kWidth)
    step.template operator()<1>(
        d, [n = dim - d](const T* p, Vec* v) { *v = n < kWidth ? load(p, n) : load(p); });
  float sums[(kSums + 3) / 4 * 4];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += 4) sums4(acc + i, sums + i);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) std::copy_n(sums + r * kTileKeys, kTileKeys, s + r * s_stride);
}

// values[r][d, d + C vectors) += the sum over `count` keys t of weights[r][t] * rows[t][d ...).
// With kAhead the same columns of rows[t + ahead] are prefetched on the way.
template <int R, int C, bool kAhead, class T, class Load>
QUIRE_INLINE void weigh_tile(const float* weights, int weight_stride, const T* const* rows,
                             int count, int ahead, int d, const State& state, Load load_value) {
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = load(state.row(r) + d + c * kWidth);
  for (int t = 0; t < count; ++t) {
    if constexpr (kAhead)
#pragma GCC unroll 4
      for (size_t i = 0; i < C * kWidth; i += 64 / sizeof(T)) prefetch_far(rows[t + ahead] + d + i);
    Vec v[C];
    load_value(rows[t] + d, v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec w = set(weights[r * weight_stride + t]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = fma(w, v[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(state.row(r) + d + c * kWidth, acc[r][c]);
}

template <int R, bool kAhead, class T>
QUIRE_INLINE void weigh_rows(const float* weights, int weight_stride, const T* const* rows,
                             int count, int ahead, int dim, const State& state) {
  const auto whole = [](const T* p, Vec* v) {
#pragma GCC unroll 2
    for (int c = 0; c < kTileColumns; c += 2) load2(p + c * kWidth, v + c);
  };
  int d = 0;
  for (; d + kTileColumns * kWidth <= dim; d += kTileColumns * kWidth)
    weigh_tile<R, kTileColumns, kAhead>(weights, weight_stride, rows, count, ahead, d, state,
                                        whole);
  for (; d + kWidth <= dim; d += kWidth)
    weigh_tile<R, 1, kAhead>(weights, weight_stride, rows, count, ahead, d, state,
                             [](const T* p, Vec* v) { *v = load(p); });
  if (d < dim)
    weigh_tile<R, 1, kAhead>(weights, weight_stride, rows, count, ahead, d, state,
                             [n = dim - d](const T* p, Vec* v) { *v = load(p, n); });
}

// f.operator()<R>() for the R = min(count, kTileRows) next rows.
template <class F>
QUIRE_INLINE void with_rows(int count, F f) {
  switch (count) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    default:
      return f.template operator()<kTileRows>();
  }
}

template <class T>
class Decode {
 public:
  static size_t scratch_floats(const Task& task) {
    return task.rows * (padded(task.p.head_dim) + padded(task.p.head_dim_v) + kScores);
  }

  Decode(const Task& task, float* scratch)
      : task_(task),
        q_stride_(static_cast<int>(padded(task.p.head_dim))),
        q_(scratch),
        s_(q_ + task.rows * q_stride_),
        chunk_{chunk_seen_, s_ + task.rows * kScores, static_cast<int>(padded(task.p.head_dim_v))},
        first_key_(task.first_key(0)),
        end_key_(std::min<int64_t>(task.end_key(task.rows - 1), task.item.kv_end)),
        v_scale_(item_scale<T>(task, task.p.v_scale)),
        ahead_(static_cast<int>(std::clamp<size_t>(kBytesAhead / (task.p.head_dim * sizeof(T)),
                                                   kTileKeys, kMaxAhead))) {
    std::fill_n(q_, task.rows * q_stride_, 0.0f);
    const float scale = task.q_scale() * item_scale<T>(task, task.p.k_scale);
    for (int r = 0; r < task.rows; ++r) load_query(task, r, scale, q_ + r * q_stride_);
  }

  // Adds the chunk of keys [begin, end) to the state. `next` is what comes then: the same chunk for
  // a further kv head, or the next one for the first.
  void chunk(int64_t begin, int64_t end, const State& state, const Task& next) {
    const int64_t first = std::max(begin, first_key_), last = std::min(end, end_key_);
    if (first >= last) return;
    const int offset = static_cast<int>(first - begin), count = static_cast<int>(last - first);
    find_rows(first, last, next);
    for (const KvScale* scale : {&task_.p.k_scale, &task_.p.v_scale})
      if (kIsQuantised<T> && scale->is_per_token) prefetch_token_scales(task_, *scale, first, last);
    score(offset, count);
    scale_tokens<T>(task_, task_.p.k_scale, first, last, s_ + offset, task_.rows, kScores);
    chunk_.clear(task_.rows);
    Fold folds[kDecodeRows];
    const int s_begin = offset / kWidth * kWidth;
    const int s_end = (offset + count + kWidth - 1) / kWidth * kWidth;
    for (int r = 0; r < task_.rows; ++r)
      folds[r] =
          fold(state.seen[r], softmax_row(task_, r, begin, s_ + r * kScores, s_begin, s_end));
    scale_tokens<T>(task_, task_.p.v_scale, first, last, s_ + offset, task_.rows, kScores);
    weigh(offset, count);
    for (int r = 0; r < task_.rows; ++r) {
      if (kIsQuantised<T>) folds[r].take *= v_scale_;
      fold_values(state.row(r), chunk_.row(r), task_.p.head_dim_v, folds[r]);
    }
  }

 private:
  static constexpr int kScores = kKvChunk + 16;  // of a row; tiles may end beyond the chunk
  static constexpr int kMaxAhead = 64;
  static constexpr size_t kBytesAhead = 16384;  // from use to prefetch

  // k of keys [first, last), their v, then the first k of `next`.
  void find_rows(int64_t first, int64_t last, const Task& next) {
    const T** out = rows_;
    task_.k_rows(first, last, out);
    out += last - first;
    task_.v_rows(first, last, out);
    out += last - first;
    const int64_t next_begin = next.item.kv_head > task_.item.kv_head ? first : last;
    const int64_t next_end = std::min(next_begin + ahead_, end_key_);
    next.k_rows(next_begin, next_end, out);
    out += next_end - next_begin;
    std::fill(out, rows_ + 2 * (last - first) + ahead_ + kWeighKeys, rows_[0]);
  }

  QUIRE_INLINE static void prefetch_rows(const T* const* rows, int count, size_t dim) {
    for (int i = 0; i < count; ++i)
      for (size_t byte = 0; byte < dim * sizeof(T); byte += 64)
        prefetch_far(reinterpret_cast<const char*>(rows[i]) + byte);
  }

  void score(int offset, int count) {
    for (int t = 0; t < count; t += kTileKeys) {
      const T* keys[kTileKeys];  // beyond the last: the last again
      for (int i = 0; i < kTileKeys; ++i) keys[i] = rows_[std::min(t + i, count - 1)];
      prefetch_rows(rows_ + t + ahead_, kTileKeys, task_.p.head_dim);
      for (int r = 0; r < task_.rows; r += kTileRows)
        with_rows(task_.rows - r, [&]<int R>() {
          dot_tile<R>(q_ + r * q_stride_, q_stride_, keys, task_.p.head_dim,
                      s_ + r * kScores + offset + t, kScores);
        });
    }
  }

  void weigh(int offset, int count) {
    for (int t = 0; t < count; t += kWeighKeys) {
      weigh_visit<true>(0, offset, t, count);
      for (int r = kTileRows; r < task_.rows; r += kTileRows)
        weigh_visit<false>(r, offset, t, count);
    }
  }

  template <bool kAhead>
  QUIRE_INLINE void weigh_visit(int r, int offset, int t, int count) {
    with_rows(task_.rows - r, [&]<int R>() {
      weigh_rows<R, kAhead>(s_ + r * kScores + offset + t, kScores, rows_ + count + t,
                            std::min(kWeighKeys, count - t), ahead_, task_.p.head_dim_v,
                            {chunk_.seen, chunk_.row(r), chunk_.stride});
    });
  }

  const Task& task_;
  int q_stride_;
  float* q_;  // [rows][q_stride], scaled
  float* s_;  // [rows][kScores]: logits of a chunk, then weights
  Seen chunk_seen_[kDecodeRows];
  State chunk_;
  int64_t first_key_, end_key_;                           // seen by any row
  float v_scale_;                                         // of all values, apart from the tokens'
  int ahead_;                                             // keys from use to prefetch
  const T* rows_[2 * kKvChunk + kMaxAhead + kWeighKeys];  // in order of use
};
