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

// Into the L2 cache: the line buffers of L1 are too few to cover the latency of memory.
QUIRE_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// Columns [d, d + kColumns) of a row, each line of memory once.
template <int kColumns, class T>
QUIRE_INLINE void fetch_columns(const T* row, int d) {
  constexpr int kLine = 64 / sizeof(T);
  if (kColumns < kLine && d % kLine != 0) return;
#pragma GCC unroll 4
  for (int i = 0; i < kColumns; i += kLine) prefetch_far(row + d + i);
}

// A row of floats as load2() loads elements of T, which comes to the same in both products; and
// back. Only whole pairs of vectors are loaded so.
template <class T>
inline void to_loaded_order(float* row, int dim) {
  if (!kLoadsPairs<T>) return;
  for (; dim >= 2 * kWidth; dim -= 2 * kWidth, row += 2 * kWidth) {
    float loaded[2 * kWidth];
    for (int i = 0; i < kWidth; ++i) loaded[i] = row[2 * i], loaded[kWidth + i] = row[2 * i + 1];
    std::copy_n(loaded, 2 * kWidth, row);
  }
}
template <class T>
inline void from_loaded_order(float* row, int dim) {
  if (!kLoadsPairs<T>) return;
  for (; dim >= 2 * kWidth; dim -= 2 * kWidth, row += 2 * kWidth) {
    float natural[2 * kWidth];
    for (int i = 0; i < kWidth; ++i) natural[2 * i] = row[i], natural[2 * i + 1] = row[kWidth + i];
    std::copy_n(natural, 2 * kWidth, row);
  }
}

constexpr int kVisitKeys = 16;  // of which a visit computes logits, or adds up values
static_assert(kVisitKeys % kWidth == 0 && kWidth % kTileKeys == 0);

// The rows of k or v that a visit reads: `count` from keys[0] + shift on, and the same columns of
// those `ahead` keys further on to be prefetched, with those `beside` them where that is not 0.
template <class T>
struct Rows {
  const T* const* keys;
  int64_t shift;
  int count, ahead;
  int64_t beside = 0;  // elements

  const T* operator[](int t) const { return keys[t] + shift; }
};

// products[r][t] = q[r] * row t elementwise, for R rows of q and kTileKeys keys from `t` on, added
// up to one vector; q is padded with zeros.
template <int R, bool kAhead, class T>
QUIRE_INLINE void dot_tile(const float* q, int q_stride, const Rows<T>& rows, int t, int dim,
                           Vec (*products)[kVisitKeys]) {
  const T *keys[kTileKeys], *ahead[kTileKeys];
#pragma GCC unroll 4
  for (int i = 0; i < kTileKeys; ++i) {
    keys[i] = rows[std::min(t + i, rows.count - 1)];  // beyond the last: the last again
    ahead[i] = rows[t + i + rows.ahead];
  }
  Vec acc[R][kTileKeys];
#pragma GCC unroll 8
  for (auto& row : acc)
#pragma GCC unroll 4
    for (Vec& a : row) a = zero();
  // C vectors from d on.
  const auto step = [&]<int C>(int d, auto load_key) {
    Vec k[kTileKeys][C];
#pragma GCC unroll 4
    for (int i = 0; i < kTileKeys; ++i) {
      if (kAhead) fetch_columns<C * kWidth>(ahead[i], d);
      if (kAhead && rows.beside) fetch_columns<C * kWidth>(ahead[i] + rows.beside, d);
      load_key(keys[i] + d, k[i]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const Vec x = in_register(load(q + r * q_stride + d + c * kWidth));
#pragma GCC unroll 4
        for (int i = 0; i < kTileKeys; ++i) acc[r][i] = fma(x, k[i][c], acc[r][i]);
      }
  };
  constexpr bool kFitsPairs = (R + 2) * kTileKeys < kRegisters;  // acc, k and x
  static_assert(kFitsPairs || !kLoadsPairs<T>);
  int d = 0;
  for (; kFitsPairs && d + 2 * kWidth <= dim; d += 2 * kWidth)
    step.template operator()<2>(d, [](const T* p, Vec* v) { load2(p, v); });
  for (; d < dim; d += kWidth)
    step.template operator()<1>(
        d, [n = dim - d](const T* p, Vec* v) { *v = n < kWidth ? load(p, n) : load(p); });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kTileKeys; ++i) products[r][t + i] = acc[r][i];
}

// s[r][t] = q[r] . row t for R rows of q; kWidth of them are written at a time. Lanes are added up
// for many keys at once: between two tiles the next one's multiply-adds would have to wait.
template <int R, bool kAhead, class T>
QUIRE_INLINE void dot_rows(const float* q, int q_stride, const Rows<T>& rows, int dim, float* s,
                           int s_stride) {
  Vec products[R][kVisitKeys];
  for (int t = 0; t < rows.count; t += kWidth) {
    for (int i = 0; i < kWidth; i += kTileKeys)
      dot_tile<R, kAhead>(q, q_stride, rows, t + i, dim, products);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(s + r * s_stride + t, lane_sums(products[r] + t));
  }
}

// Where tiles of values are added up: [rows][stride].
struct Sums {
  float* values;
  int stride;

  float* row(int r) const { return values + static_cast<int64_t>(r) * stride; }
};

// sums[r][d, d + C vectors) += the sum over the rows t of weights[r][t] * rows[t][d ...).
template <int R, int C, bool kAhead, class T, class Load>
QUIRE_INLINE void weigh_tile(const float* weights, int weight_stride, const Rows<T>& rows, int d,
                             const Sums& sums, Load load_value) {
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = load(sums.row(r) + d + c * kWidth);
#pragma GCC unroll 2
  for (int t = 0; t < rows.count; ++t) {
    if (kAhead) fetch_columns<C * kWidth>(rows[t + rows.ahead], d);
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
    for (int c = 0; c < C; ++c) store(sums.row(r) + d + c * kWidth, acc[r][c]);
}

template <int R, bool kAhead, class T>
QUIRE_INLINE void weigh_rows(const float* weights, int weight_stride, const Rows<T>& rows, int dim,
                             const Sums& sums) {
  int d = 0;
  for (; d + kTileColumns * kWidth <= dim; d += kTileColumns * kWidth)
    weigh_tile<R, kTileColumns, kAhead>(weights, weight_stride, rows, d, sums,
                                        [](const T* p, Vec* v) {
#pragma GCC unroll 2
                                          for (int c = 0; c < kTileColumns; c += 2)
                                            load2(p + c * kWidth, v + c);
                                        });
  for (; kTileColumns > 2 && d + 2 * kWidth <= dim; d += 2 * kWidth)
    weigh_tile<R, 2, kAhead>(weights, weight_stride, rows, d, sums,
                             [](const T* p, Vec* v) { load2(p, v); });
  for (; d < dim; d += kWidth)
    weigh_tile<R, 1, kAhead>(
        weights, weight_stride, rows, d, sums,
        [n = dim - d](const T* p, Vec* v) { *v = n < kWidth ? load(p, n) : load(p); });
}

// f.operator()<R>() for the next `count` rows: R are computed, kTileRows at most. Three are as many
// as four, which halves what is compiled.
template <class F>
QUIRE_INLINE void with_rows(int count, F f) {
  switch (count) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    default:
      return f.template operator()<kTileRows>();
  }
}
// So many rows are computed for `count`.
inline int computed_rows(int count) { return count % kTileRows == 3 ? count + 1 : count; }

// The rows of one sequence for one kv head, or for several that follow each other: `heads` are
// their tasks. A few keys are read for all heads before the next ones, so that heads whose keys
// lie side by side are read in the order in which they lie.
template <class T>
class Decode {
 public:
  // How many heads of the rows of one are computed together: those that lie side by side.
  static size_t most_heads(const Task& task) {
    const auto apart = static_cast<int64_t>(sizeof(T)) * std::abs(task.p.k_stride_head);
    const int64_t close = kBytesTogether / std::max<int64_t>(apart, 1);
    return std::clamp<int64_t>(close, 1, kMaxRows / computed_rows(task.rows));
  }

  static size_t scratch_floats(const Task& task, size_t num_heads) {
    return num_heads * computed_rows(task.rows) *
           (padded(task.p.head_dim) + padded(task.p.head_dim_v) + kScores);
  }

  Decode(std::span<const Task> heads, float* scratch)
      : heads_(heads),
        task_(heads[0]),
        head_rows_(computed_rows(task_.rows)),
        q_stride_(static_cast<int>(padded(task_.p.head_dim))),
        v_stride_(static_cast<int>(padded(task_.p.head_dim_v))),
        q_(scratch),
        s_(q_ + num_rows() * q_stride_),
        values_(s_ + num_rows() * kScores),
        first_key_(task_.first_key(0)),
        end_key_(std::min<int64_t>(task_.end_key(task_.rows - 1), task_.item.kv_end)) {
    const size_t bytes_a_key = task_.p.head_dim * sizeof(T) * heads.size();
    const auto visits = std::clamp<size_t>(kBytesAhead / (bytes_a_key * kVisitKeys), 1, kMaxVisits);
    ahead_ = static_cast<int>(visits) * kVisitKeys;
    const int64_t step = task_.p.block_size == 1 ? task_.p.v_stride_block : task_.p.v_stride_row;
    sum_keys_ =
        static_cast<int64_t>(sizeof(T)) * std::abs(step) < kFarRow ? kVisitKeys : kVisitKeys / 2;
    v_beside_ = find_v_beside(task_.p);
    std::fill_n(q_, num_rows() * q_stride_, 0.0f);
    for (size_t h = 0; h < heads.size(); ++h) {
      const float scale = task_.q_scale() * item_scale<T>(heads[h], task_.p.k_scale);
      for (int r = 0; r < task_.rows; ++r) {
        float* q = q_ + row(h, r) * q_stride_;
        load_query(heads[h], r, scale, q);
        to_loaded_order<T>(q, task_.p.head_dim);
      }
    }
  }

  // Adds the chunk of keys [begin, end) to the states of the heads.
  void chunk(int64_t begin, int64_t end, const State* states) {
    const int64_t first = std::max(begin, first_key_), last = std::min(end, end_key_);
    if (first >= last) return;
    const int offset = static_cast<int>(first - begin), count = static_cast<int>(last - first);
    find_rows(first, last);
    prefetch_scales(first, last);
    score(offset, count);
    std::fill_n(values_, num_rows() * v_stride_, 0.0f);
    Fold folds[kMaxRows];
    for (size_t h = 0; h < heads_.size(); ++h)
      softmax(heads_[h], h, begin, first, last, states[h].seen, folds + row(h, 0));
    weigh(offset, count);
    for (size_t h = 0; h < heads_.size(); ++h) {
      const float v_scale = item_scale<T>(heads_[h], task_.p.v_scale);
      for (int r = 0; r < task_.rows; ++r) {
        float* values = values_ + row(h, r) * v_stride_;
        from_loaded_order<T>(values, task_.p.head_dim_v);
        if (kIsQuantised<T>)  // not in the fold: what meets there may come from a slot
          for (int d = 0; d < v_stride_; d += kWidth)
            store(values + d, mul(load(values + d), set(v_scale)));
        fold_values(states[h].row(r), values, task_.p.head_dim_v, folds[row(h, r)]);
      }
    }
  }

 private:
  static constexpr int kScores = kKvChunk + 16;  // of a row; tiles may end beyond the chunk
  static constexpr int kMaxRows = 64;            // of all heads: their scores stay in the L2 cache
  static constexpr int kMaxVisits = 4;
  static constexpr size_t kBytesAhead = 16384;      // from use to prefetch
  static constexpr int64_t kBytesTogether = 65536;  // between the heads that are read together
  // Values are added up column by column: rows as far apart as this share few places of the L1
  // cache, which half a visit fits.
  static constexpr int64_t kFarRow = 2048;
  // With its v this close, a key's k and v are fetched at once: memory is slow to hand out short
  // pieces, and until v is used the L3 cache keeps it.
  static constexpr int64_t kBytesClose = 1024;
  static_assert(kKvChunk % kVisitKeys == 0);

  size_t row(size_t h, int r) const { return h * head_rows_ + r; }  // over all heads
  size_t num_rows() const { return heads_.size() * head_rows_; }

  static int64_t find_v_beside(const AttentionParams& p) {
    const int64_t bytes = reinterpret_cast<intptr_t>(p.v) - reinterpret_cast<intptr_t>(p.k);
    const bool lie_alike = p.v_stride_block == p.k_stride_block &&
                           p.v_stride_row == p.k_stride_row && p.v_stride_head == p.k_stride_head;
    return lie_alike && std::abs(bytes) <= kBytesClose ? bytes / int64_t{sizeof(T)} : 0;
  }

  // Of head 0: k of keys [first, last), their v, then the first k of the next chunk.
  void find_rows(int64_t first, int64_t last) {
    const T** out = rows_;
    task_.k_rows(first, last, out);
    out += last - first;
    task_.v_rows(first, last, out);
    out += last - first;
    const int64_t next_end = std::min(last + ahead_, end_key_);
    task_.k_rows(last, next_end, out);
    out += next_end - last;
    std::fill(out, rows_ + 2 * (last - first) + ahead_ + kVisitKeys, rows_[0]);
  }

  void prefetch_scales(int64_t first, int64_t last) const {
    if (!kIsQuantised<T>) return;
    for (const KvScale* scale : {&task_.p.k_scale, &task_.p.v_scale})
      if (scale->is_per_token)
        for (const Task& head : heads_) prefetch_token_scales(head, *scale, first, last);
  }

  void softmax(const Task& head, size_t h, int64_t begin, int64_t first, int64_t last, Seen* seen,
               Fold* folds) {
    float* s = s_ + row(h, 0) * kScores;
    const int offset = static_cast<int>(first - begin);
    const int s_begin = offset / kWidth * kWidth;
    const int s_end = static_cast<int>((last - begin + kWidth - 1) / kWidth * kWidth);
    scale_tokens<T>(head, task_.p.k_scale, first, last, s + offset, task_.rows, kScores);
    for (int r = 0; r < task_.rows; ++r)
      folds[r] = fold(seen[r], softmax_row(head, r, begin, s + r * kScores, s_begin, s_end));
    scale_tokens<T>(head, task_.p.v_scale, first, last, s + offset, task_.rows, kScores);
  }

  void score(int offset, int count) {
    for (int t = 0; t < count; t += kVisitKeys)
      for (size_t h = 0; h < heads_.size(); ++h) {
        score_visit<true>(h, 0, offset, t, count);
        for (int r = kTileRows; r < task_.rows; r += kTileRows)
          score_visit<false>(h, r, offset, t, count);
      }
  }

  // Logits of the visit at key t for head h, rows from r on.
  template <bool kAhead>
  QUIRE_INLINE void score_visit(size_t h, int r, int offset, int t, int count) {
    const int64_t shift = static_cast<int64_t>(h) * task_.p.k_stride_head;
    const int n = std::min(kVisitKeys, count - t);
    with_rows(task_.rows - r, [&]<int R>() {
      dot_rows<R, kAhead>(q_ + row(h, r) * q_stride_, q_stride_,
                          Rows<T>{rows_ + t, shift, n, ahead_, v_beside_}, task_.p.head_dim,
                          s_ + row(h, r) * kScores + offset + t, kScores);
    });
  }

  void weigh(int offset, int count) {
    for (int t = 0; t < count; t += kVisitKeys)
      for (size_t h = 0; h < heads_.size(); ++h) {
        weigh_visit<true>(h, 0, offset, t, count);
        for (int r = kTileRows; r < task_.rows; r += kTileRows)
          weigh_visit<false>(h, r, offset, t, count);
      }
  }

  template <bool kAhead>
  QUIRE_INLINE void weigh_visit(size_t h, int r, int offset, int t, int count) {
    const int64_t shift = static_cast<int64_t>(h) * task_.p.v_stride_head;
    with_rows(task_.rows - r, [&]<int R>() {
      for (const int end = std::min(t + kVisitKeys, count); t < end; t += sum_keys_)
        weigh_rows<R, kAhead>(
            s_ + row(h, r) * kScores + offset + t, kScores,
            Rows<T>{rows_ + count + t, shift, std::min(sum_keys_, end - t), ahead_},
            task_.p.head_dim_v, {values_ + row(h, r) * v_stride_, v_stride_});
    });
  }

  std::span<const Task> heads_;
  const Task& task_;  // of the first
  int head_rows_;     // computed ones; those behind the task's are zeros
  int q_stride_, v_stride_;
  float* q_;                     // [heads][head_rows][q_stride], scaled
  float* s_;                     // [heads][head_rows][kScores]: logits of a chunk, then weights
  float* values_;                // [heads][head_rows][v_stride] of a chunk
  int64_t first_key_, end_key_;  // seen by any row
  int ahead_;                    // keys from use to prefetch
  int sum_keys_;                 // whose values are added up at a time: see kFarRow
  int64_t v_beside_;             // elements from k to v of a key: see kBytesClose
  const T* rows_[2 * kKvChunk + (kMaxVisits + 1) * kVisitKeys];  // of head 0, in order of use
};
