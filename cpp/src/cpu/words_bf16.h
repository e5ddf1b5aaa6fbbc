// SPDX-License-Identifier: Apache-2.0
// Pairs of bfloat16 as the words of prefill; vdpbf16ps multiplies them at twice the rate of floats.
// The weights are rounded to bfloat16; all sums are in float.
// Included inside the namespace and target region of the tier, after words.h.
#pragma once

struct BFloat16Pairs {
  static constexpr int kElements = 2;
  static constexpr bool kScalesLogits = true;  // a scaled q would have to be rounded again

  QUIRE_INLINE static Vec multiply_add(const float* a, Vec b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(_mm512_set1_ps(*a)),
                             reinterpret_cast<__m512bh>(b.v))};
  }
  QUIRE_INLINE static Vec load_words(const BFloat16* p, int n) {
    const __mmask32 lanes = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, p))};
  }
  QUIRE_INLINE static Vec load_columns(const BFloat16* const* rows, int column, int n) {
    const __mmask16 lanes = first_lanes(n < 16 ? n : 16);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, rows[0] + column));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, rows[1] + column));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  QUIRE_INLINE static void pack_weights(float* s, int begin, int end) {
    for (int j = begin; j < end; j += 2 * kWidth) {
      const __m512bh pairs =
          _mm512_cvtne2ps_pbh(_mm512_loadu_ps(s + j + kWidth), _mm512_loadu_ps(s + j));
      _mm512_storeu_ps(s + j / 2, reinterpret_cast<__m512>(pairs));
    }
  }
};
