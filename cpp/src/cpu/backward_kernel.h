// SPDX-License-Identifier: Apache-2.0
// dq, dk and dv by recomputation: with p = exp(s - lse) of the logits s = scale * q.k,
//   dv = p^T dout,  ds = p * (dout v^T - dout.out),  dk = scale * ds^T q,  dq = scale * ds k,
// each a register-tiled matrix product over panels of floats that are read in the order of use.
// Included inside the namespace of the tier.
//
// Source: Dao, FlashAttention-2 (2023), algorithm 2.
#pragma once

static_assert(kBackwardKeys % kPanel == 0 && kBackwardKeys % kMicroRows == 0);
static_assert(kBackwardRows % kMicroRows == 0);

template <class T>
float dot_rows(const T* a, const T* b, int dim) {
  Vec total = zero();
  for (int d = 0; d < dim; d += kWidth)
    total = fma(Panels::load_some(a + d, dim - d), Panels::load_some(b + d, dim - d), total);
  return sum(total);
}

// dout . out of a tile's rows, whose turn it is at its dq, and dq = 0 if that is nobody's.
template <class T>
void prepare_backward_as(const BackwardRun& run, const BackwardHead& head, int tile) {
  const BackwardTask<T> rows(run, head);
  const bool is_empty = rows.first_chunk(tile) > rows.last_chunk(tile);
  for (int r = tile * kBackwardRows; r < rows.end_row(tile); ++r) {
    const bool sees_nothing = *rows.task.lse(r) == -kInfinity;
    run.deltas[head.first_row + r] =
        sees_nothing ? 0.0f
                     : dot_rows<T>(rows.dout_row(r), rows.task.template out_row<T>(r),
                                   run.params.forward.head_dim_v);
    if (is_empty) std::fill_n(rows.dq_row(r), run.params.forward.head_dim, T{});
  }
  run.turns[head.first_tile + tile].store(rows.first_chunk(tile), std::memory_order_relaxed);
}

// dk and dv of a chunk of keys, and its part of dq.
template <class T>
class Backward {
 public:
  static size_t scratch_floats(const AttentionParams& p) {
    const size_t of_q = Panels::size(kBackwardRows, p.head_dim);
    const size_t of_dout = Panels::size(kBackwardRows, p.head_dim_v);
    const size_t of_k = Panels::size(kBackwardKeys, p.head_dim);
    const size_t of_v = Panels::size(kBackwardKeys, p.head_dim_v);
    return of_q + of_dout + 3 * of_k + 2 * of_v + 2 * kBackwardRows * kScores;
  }

  Backward(const BackwardRun& run, const BackwardHead& head, int chunk, float* scratch)
      : p_(run.params.forward),
        rows_(run, head),
        chunk_(chunk),
        first_key_(int64_t{chunk} * kBackwardKeys),
        count_(static_cast<int>(
            std::min<int64_t>(kBackwardKeys, rows_.task.sequence.seq_len - first_key_))) {
    const auto take = [&](size_t floats) { return std::exchange(scratch, scratch + floats); };
    const auto panels = [&](int height, int columns) {
      return Panels{take(Panels::size(height, columns)), height, columns};
    };
    q_ = panels(kBackwardRows, p_.head_dim);
    dout_ = panels(kBackwardRows, p_.head_dim_v);
    k_ = panels(kBackwardKeys, p_.head_dim);
    dk_ = panels(kBackwardKeys, p_.head_dim);
    dv_ = panels(kBackwardKeys, p_.head_dim_v);
    k_transposed_ = take(Panels::size(kBackwardKeys, p_.head_dim));
    v_transposed_ = take(Panels::size(kBackwardKeys, p_.head_dim_v));
    s_ = take(kBackwardRows * kScores);
    g_ = take(kBackwardRows * kScores);
  }

  void compute() {
    dk_.clear_rows(0, kBackwardKeys);
    dv_.clear_rows(0, kBackwardKeys);
    const int num_tiles = (rows_.task.rows + kBackwardRows - 1) / kBackwardRows;
    bool is_packed = false;
    for (int tile = 0; tile < num_tiles; ++tile) {
      if (chunk_ < rows_.first_chunk(tile) || chunk_ > rows_.last_chunk(tile)) continue;
      if (!is_packed) pack_keys();
      is_packed = true;
      if (!add_tile(tile)) return;
    }
    const BackwardParams& p = rows_.run.params;
    write(dk_, static_cast<T*>(p.dk), p.dk_stride_seq, p.dk_stride_row, p.dk_stride_head);
    write(dv_, static_cast<T*>(p.dv), p.dv_stride_seq, p.dv_stride_row, p.dv_stride_head);
  }

 private:
  static constexpr int kScores = kBackwardKeys + 16;  // rows on different cache sets

  // Keys that no row sees become zeros, unread.
  void pack_keys() {
    static constexpr T kZeros[kMaxHeadDim] = {};
    const T *k_rows[kBackwardKeys], *v_rows[kBackwardKeys];
    std::fill_n(k_rows, kBackwardKeys, kZeros);
    std::fill_n(v_rows, kBackwardKeys, kZeros);
    const int first = rows_.keys_of_row(0, first_key_).begin;
    const int end = std::min(count_, rows_.keys_of_row(rows_.task.rows - 1, first_key_).end);
    rows_.task.template k_rows<T>(first_key_ + first, first_key_ + end, k_rows + first);
    rows_.task.template v_rows<T>(first_key_ + first, first_key_ + end, v_rows + first);
    for (int key = 0; key < kBackwardKeys; ++key) k_.set_row(key, k_rows[key], 1.0f);
    transpose_rows(k_rows, p_.head_dim, k_transposed_);
    transpose_rows(v_rows, p_.head_dim_v, v_transposed_);
  }

  // [kBackwardKeys / kPanel][dim][kPanel]
  static void transpose_rows(const T* const* rows, int dim, float* to) {
    for (int key = 0; key < kBackwardKeys; key += kWidth) {
      float* panel = to + static_cast<int64_t>(key / kPanel) * dim * kPanel + key % kPanel;
      for (int d = 0; d < dim; d += kWidth) {
        Vec x[kWidth];
        for (int i = 0; i < kWidth; ++i) x[i] = Panels::load_some(rows[key + i] + d, dim - d);
        transpose(x);
        for (int i = 0; i < kWidth && d + i < dim; ++i)
          store(panel + static_cast<int64_t>(d + i) * kPanel, x[i]);
      }
    }
  }

  // False: the run has failed elsewhere.
  bool add_tile(int tile) {
    first_row_ = tile * kBackwardRows;
    num_rows_ = rows_.end_row(tile) - first_row_;
    padded_rows_ = (num_rows_ + kMicroRows - 1) / kMicroRows * kMicroRows;
    pack_rows();
    for (int r = 0; r < padded_rows_; r += kMicroRows) weigh_rows(r);
    add_to_keys();
    if (!rows_.run.await_turn(rows_.head.first_tile + tile, chunk_)) return false;
    for (int r = 0; r < num_rows_; r += kMicroRows) add_to_dq(r, chunk_ == rows_.first_chunk(tile));
    if (chunk_ == rows_.last_chunk(tile)) finish_dq();
    rows_.run.turns[rows_.head.first_tile + tile].store(chunk_ + 1, std::memory_order_release);
    return true;
  }

  bool is_empty(int r) const { return *rows_.task.lse(first_row_ + r) == -kInfinity; }

  // Rows that see no key become zeros, unread.
  void pack_rows() {
    for (int r = 0; r < num_rows_; ++r) {
      if (is_empty(r)) {
        q_.clear_rows(r, r + 1);
        dout_.clear_rows(r, r + 1);
      } else {
        q_.set_row(r, rows_.task.template q_row<T>(first_row_ + r), p_.scale);
        dout_.set_row(r, rows_.dout_row(first_row_ + r), 1.0f);
      }
    }
    q_.clear_rows(num_rows_, padded_rows_);
    dout_.clear_rows(num_rows_, padded_rows_);
  }

  // Keys that any of the rows [r, r + kMicroRows) sees.
  KeyRange keys_of_rows(int r) const {
    const int last = std::min(r + kMicroRows, num_rows_) - 1;
    return {rows_.keys_of_row(first_row_ + r, first_key_).begin,
            rows_.keys_of_row(first_row_ + last, first_key_).end};
  }

  // s_ = p and g_ = ds of rows [r, r + kMicroRows); zeros where a row does not see a key.
  void weigh_rows(int r) {
    const KeyRange keys = keys_of_rows(r);
    const int begin = keys.begin / kPanel * kPanel, end = (keys.end + kPanel - 1) / kPanel * kPanel;
    for (int key = begin; key < end; key += kPanel) {
      multiply_transposed(q_, r, k_transposed_, key, s_);
      multiply_transposed(dout_, r, v_transposed_, key, g_);
    }
    for (int i = r; i < r + kMicroRows; ++i) {
      float *s = s_ + i * kScores, *g = g_ + i * kScores;
      KeyRange seen{begin, begin};
      if (i < num_rows_ && !is_empty(i) && begin < end) {
        seen = rows_.keys_of_row(first_row_ + i, first_key_);
        differentiate(i, s, g, begin, end);
        if (p_.mask) apply_mask(i, s, g, seen);
      }
      for (float* x : {s, g}) {
        std::fill(x, x + seen.begin, 0.0f);
        std::fill(x + seen.end, x + kBackwardKeys, 0.0f);
      }
    }
  }

  // scores = rows [r, r + kMicroRows) of a times a panel of transposed keys.
  QUIRE_INLINE static void multiply_transposed(const Panels& a, int r, const float* keys, int key,
                                               float* scores) {
    ProductTile tile;
    tile.clear();
    const float* b = keys + static_cast<int64_t>(key) * a.columns;
    for (int d = 0; d < a.columns; d += kPanel)
      tile.add(a.at(r, d), kPanel, 1, b + static_cast<int64_t>(d) * kPanel,
               std::min(kPanel, a.columns - d));
#pragma GCC unroll 12
    for (int i = 0; i < kMicroRows; ++i) {
      store(scores + (r + i) * kScores + key, tile.sums[i][0]);
      store(scores + (r + i) * kScores + key + kWidth, tile.sums[i][1]);
    }
  }

  // Of a row: logits s to p, and dp = g to ds, over keys [begin, end) whether seen or not.
  void differentiate(int r, float* s, float* g, int begin, int end) const {
    const int row = first_row_ + r;
    const Vec delta = set(rows_.run.deltas[rows_.head.first_row + row]);
    const Vec shift = set(-*rows_.task.lse(row) * kLog2E);
    const Vec cap = set(p_.softcap), one = set(1.0f);
    const Vec slope = set(p_.alibi_slopes ? p_.alibi_slopes[rows_.task.head(row)] : 0.0f);
    const int64_t ahead = first_key_ - rows_.task.position(row);
    for (int j = begin; j < end; j += kWidth) {
      Vec x = load(s + j), factor = one;
      if (p_.softcap > 0) {
        const Vec bent = tanh(div(x, cap));
        x = mul(cap, bent);
        factor = sub(one, mul(bent, bent));
      }
      if (p_.alibi_slopes) {
        const Vec distance = add(iota(), set(static_cast<float>(ahead + j)));
        x = sub(x, mul(slope, max(distance, sub(zero(), distance))));
      }
      const Vec probability = exp2(fma(x, set(kLog2E), shift));
      store(s + j, probability);
      store(g + j, mul(mul(probability, factor), sub(load(g + j), delta)));
    }
  }

  void apply_mask(int r, float* s, float* g, KeyRange seen) const {
    const uint8_t* bits = rows_.task.mask_row(first_row_ + r);
    const Sequence& sequence = rows_.task.sequence;
    const int64_t bit_of_first =
        first_key_ - (p_.mask_is_tree ? int64_t{sequence.seq_len} - sequence.q_len : 0);
    for (int j = seen.begin; j < seen.end; ++j) {
      const int64_t bit = bit_of_first + j;
      if (bit >= 0 && !(bits[bit / 8] >> (bit % 8) & 1)) s[j] = g[j] = 0.0f;
    }
  }

  // dv += p^T dout, dk += ds^T q, for the rows of the tile that see a key at all.
  void add_to_keys() {
    const int begin = rows_.keys_of_row(first_row_, first_key_).begin;
    const int end = rows_.keys_of_row(first_row_ + num_rows_ - 1, first_key_).end;
    int row = 0, end_row = 0;  // of the rows that see any of kMicroRows keys; both rise
    for (int key = begin / kMicroRows * kMicroRows; key < end; key += kMicroRows) {
      while (row < num_rows_ && rows_.keys_of_row(first_row_ + row, first_key_).end <= key) ++row;
      while (end_row < num_rows_ &&
             rows_.keys_of_row(first_row_ + end_row, first_key_).begin < key + kMicroRows)
        ++end_row;
      multiply_columns(s_, dout_, row, end_row, key, dv_);
      multiply_columns(g_, q_, row, end_row, key, dk_);
    }
  }

  // Rows [key, key + kMicroRows) of `sums` += columns of weights times b, over rows [row, end).
  static void multiply_columns(const float* weights, const Panels& b, int row, int end, int key,
                               const Panels& sums) {
    for (int d = 0; d < b.columns; d += kPanel) {
      ProductTile tile;
      float* to = sums.at(key, d);
#pragma GCC unroll 12
      for (int i = 0; i < kMicroRows; ++i) {
        tile.sums[i][0] = load(to + i * kPanel);
        tile.sums[i][1] = load(to + i * kPanel + kWidth);
      }
      tile.add(weights + row * kScores + key, 1, kScores, b.at(row, d), end - row);
#pragma GCC unroll 12
      for (int i = 0; i < kMicroRows; ++i) {
        store(to + i * kPanel, tile.sums[i][0]);
        store(to + i * kPanel + kWidth, tile.sums[i][1]);
      }
    }
  }

  // dq of rows [r, r + kMicroRows) = or += scale * ds k.
  void add_to_dq(int r, bool is_first) {
    const KeyRange keys = keys_of_rows(r);
    const Vec scale = set(p_.scale);
    for (int d = 0; d < p_.head_dim; d += kPanel) {
      ProductTile tile;
      tile.clear();
      tile.add(g_ + r * kScores + keys.begin, kScores, 1, k_.at(keys.begin, d),
               keys.end - keys.begin);
      float part[kMicroRows][kPanel];
#pragma GCC unroll 12
      for (int i = 0; i < kMicroRows; ++i) {
        store(part[i], mul(scale, tile.sums[i][0]));
        store(part[i] + kWidth, mul(scale, tile.sums[i][1]));
      }
      const int columns = std::min(kPanel, p_.head_dim - d);
      for (int i = 0; i < std::min(kMicroRows, num_rows_ - r); ++i) {
        float* to = rows_.dq_sums(first_row_ + r + i) + d;
        for (int j = 0; j < columns; ++j) to[j] = is_first ? part[i][j] : to[j] + part[i][j];
      }
    }
  }

  // Sums to elements, where those are not floats already.
  void finish_dq() {
    if constexpr (!std::is_same_v<T, float>)
      for (int r = first_row_; r < first_row_ + num_rows_; ++r)
        store_row(rows_.dq_row(r), p_.head_dim,
                  [&](int d) { return Panels::load_some(rows_.dq_sums(r) + d, p_.head_dim - d); });
  }

  template <class Load>
  static void store_row(T* to, int dim, Load load_at) {
    int d = 0;
    for (; d + kWidth <= dim; d += kWidth) store(to + d, load_at(d));
    if (d < dim) store(to + d, load_at(d), dim - d);
  }

  void write(const Panels& from, T* to, int64_t seq, int64_t row, int64_t head) const {
    to += rows_.head.sequence * seq + (rows_.task.sequence.kv_row + first_key_) * row +
          rows_.head.kv_head * head;
    for (int key = 0; key < count_; ++key)
      store_row(to + key * row, from.columns, [&](int d) { return load(from.at(key, d)); });
  }

  const AttentionParams& p_;
  BackwardTask<T> rows_;
  int chunk_;
  int64_t first_key_;
  int count_;            // keys of the chunk
  Panels q_, dout_;      // of a tile of rows, q scaled
  Panels k_, dk_, dv_;   // of the chunk
  float* k_transposed_;  // [kBackwardKeys / kPanel][head_dim][kPanel]
  float* v_transposed_;  // likewise
  float *s_, *g_;        // [kBackwardRows][kScores]: logits, then p; dp, then ds
  int first_row_ = 0, num_rows_ = 0, padded_rows_ = 0;  // of the tile
};

// f.operator()<T>() for the element type of the call.
template <class F>
void with_gradient_type(const BackwardRun& run, F f) {
  const ElementType type = run.params.forward.dtype;
  if (type == ElementType::kFloat32) return f.template operator()<float>();
  if (type == ElementType::kFloat16) return f.template operator()<Float16>();
  f.template operator()<BFloat16>();
}

inline void prepare_backward(const BackwardRun& run, const BackwardHead& head, int tile) {
  with_gradient_type(run, [&]<class T>() { prepare_backward_as<T>(run, head, tile); });
}

inline void backward(const BackwardRun& run, const BackwardHead& head, int chunk) {
  with_gradient_type(run, [&]<class T>() {
    float* scratch = thread_scratch(Backward<T>::scratch_floats(run.params.forward));
    Backward<T>(run, head, chunk, scratch).compute();
  });
}
