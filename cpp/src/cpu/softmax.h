// SPDX-License-Identifier: Apache-2.0
// The softmax of rows over chunks of keys: logits to weights within a chunk, and how results of
// chunks meet. Maxima are in base 2; values are not yet divided by the sum.
// Included inside the namespace of the tier.
//
// Source: online softmax, Milakov & Gimelshein 2018; Dao et al., FlashAttention-2, 2023.
#pragma once

// What a row has seen of some keys.
struct Seen {
  float maximum = -kInfinity;
  float sum = 0;
};

// How the values of a row and of a further chunk add up: keep * values + take * more.
struct Fold {
  float keep = 1, take = 0;

  QUIRE_INLINE Vec operator()(Vec values, Vec more) const {
    return fma(more, set(take), mul(values, set(keep)));
  }
};

// The one place where results of chunks meet: `row` takes note of `more`.
QUIRE_INLINE Fold fold(Seen& row, Seen more) {
  if (more.maximum == -kInfinity) return {};
  const float top = row.maximum > more.maximum ? row.maximum : more.maximum;
  const Fold result{exp2(row.maximum - top), exp2(more.maximum - top)};
  row = {top, row.sum * result.keep + more.sum * result.take};
  return result;
}

inline void fold_values(float* values, const float* more, int dim, const Fold& fold) {
  int d = 0;
  for (; d + kWidth <= dim; d += kWidth) store(values + d, fold(load(values + d), load(more + d)));
  if (d < dim) {
    const int n = dim - d;
    store(values + d, fold(load(values + d, n), load(more + d, n)), n);
  }
}

// The running softmax of an item's rows.
struct State {
  Seen* seen;     // [rows]
  float* values;  // [rows][stride]
  int stride;

  float* row(int r) const { return values + static_cast<int64_t>(r) * stride; }
  void clear(int rows) const {
    std::fill_n(seen, rows, Seen{});
    std::fill_n(values, static_cast<int64_t>(rows) * stride, 0.0f);
  }
};

// Room for a row of values in whole pairs of vectors.
inline int value_stride(const Task& task) {
  return (task.p.head_dim_v + 2 * kWidth - 1) / (2 * kWidth) * (2 * kWidth);
}

// Softcap and ALiBi, then base 2, on logits s[begin, end) of a row: s[j] is of key first + j.
inline void bend_logits(const Task& task, int row, int64_t first, float* s, int begin, int end) {
  const AttentionParams& p = task.p;
  const Vec cap = set(p.softcap);
  const Vec slope = set(p.alibi_slopes ? p.alibi_slopes[task.head(row)] : 0.0f);
  const int64_t ahead = first - task.position(row);
  for (int j = begin; j < end; j += kWidth) {
    Vec x = load(s + j);
    if (p.softcap > 0) x = mul(cap, tanh(div(x, cap)));
    const Vec distance = add(iota(), set(static_cast<float>(ahead + j)));
    x = sub(x, mul(slope, max(distance, sub(zero(), distance))));
    store(s + j, mul(x, set(kLog2E)));
  }
}

// Hides the keys in s[begin, end) whose bit is 0.
inline void apply_mask(const Task& task, int row, int64_t first, float* s, int begin, int end) {
  const uint8_t* bits = task.mask_row(row);
  const int64_t bit_of_first =
      first + (task.p.mask_is_tree ? int64_t{task.sequence.q_len} - task.sequence.seq_len : 0);
  if (bit_of_first + begin < 0)  // before a tree all keys are seen
    begin = static_cast<int>(std::min<int64_t>(end, -bit_of_first));
  for (int j = begin; j < end; ++j) {
    const int64_t bit = bit_of_first + j;
    if (!(bits[bit / 8] >> (bit % 8) & 1)) s[j] = -kInfinity;
  }
}

// Logits s[begin, end) of a row become weights; s[j] is of key first + j, the chunk's first key.
// Keys that the row does not see get weight 0, whatever their logit. begin and end are multiples
// of the vector width; the bits do not depend on them, as unseen keys add nothing to any lane.
inline Seen softmax_row(const Task& task, int row, int64_t first, float* s, int begin, int end) {
  const int seen_begin =
      static_cast<int>(std::clamp<int64_t>(task.first_key(row) - first, begin, end));
  const int seen_end =
      static_cast<int>(std::clamp<int64_t>(task.end_key(row) - first, seen_begin, end));
  if (!task.is_plain()) bend_logits(task, row, first, s, begin, end);
  std::fill(s + begin, s + seen_begin, -kInfinity);
  std::fill(s + seen_end, s + end, -kInfinity);
  if (task.p.mask) apply_mask(task, row, first, s, seen_begin, seen_end);

  Vec top = set(-kInfinity);
  for (int j = begin; j < end; j += kWidth) top = max(top, load(s + j));
  float maximum = largest(top);
  if (maximum == -kInfinity) {
    // Maxima lose NaN: a row of nothing else is no row that sees nothing.
    if (std::none_of(s + begin, s + end, [](float x) { return std::isnan(x); })) {
      std::fill(s + begin, s + end, 0.0f);
      return {};
    }
    maximum = 0;
  }
  const Vec base = set(maximum);
  Vec total = zero();
  for (int j = begin; j < end; j += kWidth) {
    const Vec weight = exp2(sub(load(s + j), base));
    store(s + j, weight);
    total = add(total, weight);
  }
  return {maximum, sum(total)};
}

// Leaves what row `row` of the task has seen of a chunk, row `from` of the state, in its slot.
inline void store_partial(const Run& run, const Task& task, int row, int64_t slot,
                          const State& state, int from) {
  float* partial = run.partial(slot, row);
  partial[0] = state.seen[from].maximum;
  partial[1] = state.seen[from].sum;
  std::copy_n(state.row(from), task.p.head_dim_v, partial + 2);
}

// Divides by the sum and writes out and lse. A sink joins the denominator only.
template <class T>
void finish_row(const Task& task, int row, Seen seen, const float* values) {
  const AttentionParams& p = task.p;
  const bool is_empty = seen.maximum == -kInfinity;
  float keep = 1;  // the values are relative to the maximum without the sink
  if (p.sinks && !is_empty) keep = fold(seen, {p.sinks[task.head(row)] * kLog2E, 1.0f}).keep;
  if (p.lse) *task.lse(row) = is_empty ? -kInfinity : (seen.maximum + std::log2(seen.sum)) * kLn2;
  T* out = task.out_row<T>(row);
  const Vec factor = set(is_empty ? 0.0f : keep / seen.sum);  // values of an empty row are 0
  int d = 0;
  for (; d + kWidth <= p.head_dim_v; d += kWidth) store(out + d, mul(load(values + d), factor));
  if (d < p.head_dim_v) {
    const int n = p.head_dim_v - d;
    store(out + d, mul(load(values + d, n), factor), n);
  }
}
