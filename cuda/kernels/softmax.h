// SPDX-License-Identifier: Apache-2.0
// Scores to weights: options of attention per score, and the online softmax over tiles of keys.
// Exponentials are powers of two throughout; maxima and denominators are in units of log2.
#pragma once

#include "kernels/scales.h"

namespace quire::device {

inline constexpr float kLn2 = 0.69314718055994530942f;

// What a thread has to know of one of the two rows of its fragments.
struct ScoreRow {
  KeyRange visible;  // an item that ends earlier ends with a tile
  int position;
  float slope;          // of ALiBi
  const uint8_t* mask;  // bits, or null
  int mask_begin;       // key of the first bit; all before are seen
};

QUIRE_DEVICE ScoreRow make_score_row(const AttentionParams& p, const Item& item, int row) {
  ScoreRow r{visible_keys(p, item, row), item.position(row), 0, nullptr, 0};
  if (p.alibi_slopes) r.slope = ld_global(p.alibi_slopes + item.head(row));
  if (p.mask) {
    r.mask =
        p.mask + item.sequence_index * p.mask_stride_seq + item.batch_row(row) * p.mask_stride_row;
    r.mask_begin = p.mask_is_tree ? item.sequence.seq_len - item.sequence.q_len : 0;
  }
  return r;
}

// A row in 32 bytes of shared memory, where there are no registers for it.
QUIRE_DEVICE void store_score_row(SharedAddress slot, const ScoreRow& row) {
  const auto word = [](int value) { return static_cast<uint32_t>(value); };
  const auto mask = reinterpret_cast<uint64_t>(row.mask);
  st_shared(slot, U32x4{word(row.visible.begin), word(row.visible.end), word(row.position),
                        bits_of(row.slope)});
  st_shared(slot + 16, U32x4{word(row.mask_begin), static_cast<uint32_t>(mask),
                             static_cast<uint32_t>(mask >> 32), 0});
}

template <Mode kMode>
QUIRE_DEVICE ScoreRow load_score_row(SharedAddress slot) {
  const U32x4 low = ld_shared<U32x4>(slot);
  ScoreRow row{{static_cast<int>(low.x), static_cast<int>(low.y)}, 0, 0, nullptr, 0};
  if constexpr (kMode == Mode::kFull) {
    const U32x4 high = ld_shared<U32x4>(slot + 16);
    row.position = static_cast<int>(low.z);
    row.slope = float_of(low.w);
    row.mask = reinterpret_cast<const uint8_t*>(uint64_t{high.z} << 32 | high.y);
    row.mask_begin = static_cast<int>(high.x);
  }
  return row;
}

template <bool kHasMask>
QUIRE_DEVICE bool is_visible(const ScoreRow& row, int key) {
  if (key < row.visible.begin || key >= row.visible.end) return false;
  if (!kHasMask || !row.mask || key < row.mask_begin) return true;
  const int bit = key - row.mask_begin;
  return ld_global(row.mask + bit / 8) >> bit % 8 & 1;
}

// From exp2, as the tanh instruction is less exact than float16.
QUIRE_DEVICE float tanh(float x) { return 1.0f - 2.0f * rcp(1.0f + exp2(2.0f * kLog2E * x)); }

// A raw q.k to its logit in units of log2.
QUIRE_DEVICE float apply_options(const AttentionParams& p, const ScoreRow& row, float score,
                                 int key) {
  float x = score * p.scale;
  if (p.softcap > 0) x = p.softcap * tanh(x / p.softcap);
  const int distance = max(row.position - key, key - row.position);
  return (x - row.slope * static_cast<float>(distance)) * kLog2E;
}

// Hides what may not be seen and, in full mode, applies the options. Keys of the tile begin at
// `first_key`; element 2h + e of fragment n is row h, key 8n + 2 (lane % 4) + e.
template <Mode kMode, int kKeys, bool kHasMask = kMode == Mode::kFull>
QUIRE_DEVICE void mask_scores(const AttentionParams& p, const ScoreRow (&rows)[2], int first_key,
                              float (&scores)[kKeys / 8][4]) {
  const int lane_key = first_key + thread_index() % 4 * 2;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const KeyRange visible = rows[h].visible;
    const bool all = first_key >= visible.begin && first_key + kKeys <= visible.end;
    if (kMode == Mode::kFast && all) continue;
    QUIRE_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) QUIRE_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int key = lane_key + 8 * n + e;
      float& score = scores[n][2 * h + e];
      if (kMode == Mode::kFull) score = apply_options(p, rows[h], score, key);
      if (!is_visible<kHasMask>(rows[h], key)) score = -kInfinity;
    }
  }
}

// From scores as the mask leaves them to units of log2.
template <class Traits>
QUIRE_DEVICE float score_factor(const AttentionParams& p) {
  const bool is_raw = Traits::kMode == Mode::kFast && !Traits::kIsQuantised;
  return is_raw ? p.scale * kLog2E : 1.0f;
}

// Maximum and denominator of a row. Within a chunk of keys `max` is of the scores as they come
// and `sum` is of this lane's keys only; finish() makes both final.
struct RowStats {
  float max = -kInfinity;
  float sum = 0;

  QUIRE_DEVICE RowStats finish(float factor) const {
    float total = sum + shuffle_xor(sum, 1);
    total += shuffle_xor(total, 2);
    return {mul(max, factor), total};
  }
};

// -inf - -inf is not a number, so a row that has seen nothing yet is compared with 0.
QUIRE_DEVICE float finite_or_zero(float max) { return max == -kInfinity ? 0.0f : max; }

// 2^x of x <= 0 without the unit for exponentials, to 3e-6 of the value; 0 below 2^-126. The
// integer part goes to the exponent, and what is left, at most 1/2, through a polynomial.
QUIRE_DEVICE float exp2_by_polynomial(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: sums with it are rounded to integers
  const float clamped = x < -127.0f ? -127.0f : x;  // not max(): NaN stays NaN
  const float shifted = clamped + kToInteger;
  const float rest = clamped - (shifted - kToInteger);
  float power = fma(rest, 0.009582853f, 0.055906426f);
  power = fma(power, rest, 0.24024099f);
  power = fma(power, rest, 0.6931242f);
  power = fma(power, rest, 1.0f);
  return power * float_of((bits_of(shifted) << 23) + (127u << 23));
}

// By what the sums so far of a thread's two rows are to be multiplied.
struct Rescale {
  float rows[2];
};

// Which of a tile's keys, eight at a time: by their place in the tile alone, so that no row's bits
// depend on another.
template <class Traits>
QUIRE_DEVICE constexpr bool is_by_polynomial(int n) {
  return Traits::kPolynomialEvery > 0 && n % Traits::kPolynomialEvery == 1;
}

// Scores times `factor` (> 0) become weights 2^(score - max + kShift), times the tokens' scales of
// V. A tile in which a row sees nothing changes nothing of it, bit by bit.
template <class Traits, int kShift = 0>
QUIRE_DEVICE Rescale to_weights(float factor, const TokenScales& tokens, RowStats (&rows)[2],
                                float (&scores)[Traits::kKeys / 8][4]) {
  constexpr int kKeys = Traits::kKeys;
  Rescale rescale;
  const bool is_scaled = Traits::kIsQuantised && tokens.exist;
  const int lane_key = thread_index() % 4 * 2;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) {
    float top = rows[h].max;
    QUIRE_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) {
      F32x2 score{scores[n][2 * h], scores[n][2 * h + 1]};
      if (is_scaled) {
        const F32x2 token = tokens.of_pair(8 * n + lane_key);
        score.x += log2_floor(token.x);
        score.y += log2_floor(token.y);
      }
      top = max(top, max(score.x, score.y));
    }
    top = max(top, shuffle_xor(top, 1));
    top = max(top, shuffle_xor(top, 2));
    const float base = mul(finite_or_zero(top), factor);
    const float shifted = kShift == 0 ? -base : kShift - base;
    // Not an fma: an unchanged maximum must give exactly 1.
    rescale.rows[h] = exp2(mul(rows[h].max, factor) - base);
    float sum = rows[h].sum * rescale.rows[h];
    QUIRE_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) {
      QUIRE_UNROLL
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        const float power = fma(scores[n][e], factor, shifted);
        scores[n][e] = is_by_polynomial<Traits>(n) ? exp2_by_polynomial(power) : exp2(power);
        sum += scores[n][e];
      }
      if (is_scaled) {
        const F32x2 token = tokens.of_pair(8 * n + lane_key);
        scores[n][2 * h] *= token.x;
        scores[n][2 * h + 1] *= token.y;
      }
    }
    rows[h] = {top, sum};
  }
  return rescale;
}

// What was summed before, to the new maximum.
template <class Traits>
QUIRE_DEVICE void rescale_sums(const Rescale& rescale, float (&sums)[Traits::kHeadDim / 8][4]) {
  QUIRE_UNROLL
  for (int n = 0; n < Traits::kHeadDim / 8; ++n) QUIRE_UNROLL
  for (int e = 0; e < 4; ++e) sums[n][e] *= rescale.rows[e / 2];
}

template <class Traits>
QUIRE_DEVICE void add_to_softmax(float factor, const TokenScales& tokens, RowStats (&rows)[2],
                                 float (&scores)[Traits::kKeys / 8][4],
                                 float (&sums)[Traits::kHeadDim / 8][4]) {
  rescale_sums<Traits>(to_weights<Traits>(factor, tokens, rows, scores), sums);
}

}  // namespace quire::device
