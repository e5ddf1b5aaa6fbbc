// SPDX-License-Identifier: Apache-2.0
// Pairs of bfloat16 as the words of prefill, multiplied by bfdot: twice the products of fmla.
// The weights are rounded to bfloat16; all sums are in float.
// Included inside the namespace and target region of the tier, after words.h.
#pragma once

template <>
struct Words<BFloat16> : VectorProducts {
  using Products = Words;
  static constexpr int kElements = 2;
  static constexpr bool kScalesLogits = true;  // a scaled q would have to be rounded again

  QUIRE_INLINE static Vec multiply_add(const float* a, Vec b, Vec sum) {
    return {
        vbfdotq_f32(sum.v, vreinterpretq_bf16_f32(vld1q_dup_f32(a)), vreinterpretq_bf16_f32(b.v))};
  }
  QUIRE_INLINE static Vec load_words(const BFloat16* p, int n) {
    if (n >= 8) return {vreinterpretq_f32_u16(vld1q_u16(&p->bits))};
    uint16_t part[8] = {};
    for (int i = 0; i < n; ++i) part[i] = p[i].bits;
    return {vreinterpretq_f32_u16(vld1q_u16(part))};
  }
  QUIRE_INLINE static Vec load_columns(const BFloat16* const* rows, int column, int n) {
    uint16_t part[2][4] = {};
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < (n < 4 ? n : 4); ++j) part[i][j] = rows[i][column + j].bits;
    const uint16x4x2_t pairs = vzip_u16(vld1_u16(part[0]), vld1_u16(part[1]));
    return {vreinterpretq_f32_u16(vcombine_u16(pairs.val[0], pairs.val[1]))};
  }
  QUIRE_INLINE static void pack_weights(float* s, int begin, int end) {
    for (int j = begin; j < end; j += 2 * kWidth) {
      const bfloat16x8_t low = vcvtq_low_bf16_f32(vld1q_f32(s + j));
      vst1q_f32(s + j / 2,
                vreinterpretq_f32_bf16(vcvtq_high_bf16_f32(low, vld1q_f32(s + j + kWidth))));
    }
  }
};
