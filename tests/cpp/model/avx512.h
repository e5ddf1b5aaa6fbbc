// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, DQ, VL and BF16 as far as the kernels go. Included by the model's immintrin.h.
#pragma once

// ---- halves
QUIRE_INLINE __m256 _mm512_castps512_ps256(__m512 a) {
  return __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7);
}
QUIRE_INLINE __m256 _mm512_extractf32x8_ps(__m512 a, int half) {
  return half ? __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15)
              : _mm512_castps512_ps256(a);
}
QUIRE_INLINE __m512 join(__m256 low, __m256 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
// f of the low halves, then of the high ones.
template <class F, class... A>
QUIRE_INLINE __m512 by_halves(F f, A... a) {
  return join(f(_mm512_castps512_ps256(a)...), f(_mm512_extractf32x8_ps(a, 1)...));
}

// ---- constants and casts
QUIRE_INLINE __m512 _mm512_set1_ps(float x) { return join(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
QUIRE_INLINE __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0); }
template <class... A>
QUIRE_INLINE __m512 _mm512_setr_ps(A... x) {
  return __m512{static_cast<float>(x)...};
}
QUIRE_INLINE __m512i _mm512_castps_si512(__m512 a) { return reinterpret_cast<__m512i>(a); }
QUIRE_INLINE __m512 _mm512_castsi512_ps(__m512i a) { return reinterpret_cast<__m512>(a); }
QUIRE_INLINE __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
  return _mm256_castps_si256(_mm512_extractf32x8_ps(_mm512_castsi512_ps(a), half));
}
QUIRE_INLINE __m256i _mm512_castsi512_si256(__m512i a) { return _mm512_extracti64x4_epi64(a, 0); }
QUIRE_INLINE __m512i _mm512_castsi256_si512(__m256i a) {
  return _mm512_castps_si512(join(_mm256_castsi256_ps(a), _mm256_setzero_ps()));
}
QUIRE_INLINE float _mm512_cvtss_f32(__m512 a) { return a[0]; }

// ---- memory; what a mask leaves out is not touched
QUIRE_INLINE __m512 _mm512_loadu_ps(const void* p) {
  __m512 a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
QUIRE_INLINE __m512i _mm512_loadu_si512(const void* p) {
  return _mm512_castps_si512(_mm512_loadu_ps(p));
}
QUIRE_INLINE void _mm512_storeu_ps(void* p, __m512 a) { std::memcpy(p, &a, sizeof(a)); }
template <class V, class T>
QUIRE_INLINE V load_masked(uint64_t mask, const void* p) {
  T lanes[sizeof(V) / sizeof(T)] = {};
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) lanes[i] = static_cast<const T*>(p)[i];
  V a;
  std::memcpy(&a, lanes, sizeof(a));
  return a;
}
template <class T, class V>
QUIRE_INLINE void store_masked(void* p, uint64_t mask, V a) {
  T lanes[sizeof(V) / sizeof(T)];
  std::memcpy(lanes, &a, sizeof(a));
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) static_cast<T*>(p)[i] = lanes[i];
}
QUIRE_INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return load_masked<__m512, float>(mask, p);
}
QUIRE_INLINE __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return load_masked<__m256i, uint16_t>(mask, p);
}
QUIRE_INLINE __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return load_masked<__m512i, uint16_t>(mask, p);
}
QUIRE_INLINE __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* p) {
  return load_masked<__m128i, uint8_t>(mask, p);
}
QUIRE_INLINE void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 a) {
  store_masked<float>(p, mask, a);
}
QUIRE_INLINE void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i a) {
  store_masked<uint16_t>(p, mask, a);
}

// ---- floats
QUIRE_INLINE __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
QUIRE_INLINE __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
QUIRE_INLINE __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
QUIRE_INLINE __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
QUIRE_INLINE __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return by_halves([](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, a, b);
}
QUIRE_INLINE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
QUIRE_INLINE __m512 _mm512_roundscale_ps(__m512 a, int) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return by_halves([](__m256 x) { return _mm256_round_ps(x, kNearest); }, a);
}
QUIRE_INLINE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (std::isnan(a[i]) || std::isnan(b[i]) ? 1u : 0u) << i;
  return static_cast<__mmask16>(mask);
}
template <class F>
QUIRE_INLINE float reduce(__m512 a, F f) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] = f(a[i], a[i + width]);
  return a[0];
}
QUIRE_INLINE float _mm512_reduce_add_ps(__m512 a) {
  return reduce(a, [](float x, float y) { return x + y; });
}
QUIRE_INLINE float _mm512_reduce_max_ps(__m512 a) {
  return reduce(a, [](float x, float y) { return x > y ? x : y; });
}

// ---- lanes that move
QUIRE_INLINE __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return by_halves([](__m256 x, __m256 y) { return _mm256_unpacklo_ps(x, y); }, a, b);
}
QUIRE_INLINE __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return by_halves([](__m256 x, __m256 y) { return _mm256_unpackhi_ps(x, y); }, a, b);
}
QUIRE_INLINE __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
  __m512 result;
  for (int i = 0; i < 16; ++i)
    result[i] = (i % 4 < 2 ? a : b)[i / 4 * 4 + (order >> 2 * (i % 4) & 3)];
  return result;
}
QUIRE_INLINE __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
  __m512 result;
  for (int i = 0; i < 16; ++i) result[i] = (i < 8 ? a : b)[(order >> 2 * (i / 4) & 3) * 4 + i % 4];
  return result;
}

// ---- integers
QUIRE_INLINE __m512i from_ints(Ints a) { return reinterpret_cast<__m512i>(a); }
QUIRE_INLINE Ints to_ints(__m512i a) { return reinterpret_cast<Ints>(a); }
QUIRE_INLINE __m512i _mm512_set1_epi32(int x) { return from_ints(Ints{} + x); }
QUIRE_INLINE __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return reinterpret_cast<__m512i>(reinterpret_cast<Words32>(a) + reinterpret_cast<Words32>(b));
}
QUIRE_INLINE __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
QUIRE_INLINE __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
QUIRE_INLINE __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  return reinterpret_cast<__m512i>(reinterpret_cast<Words32>(a) << n);
}
QUIRE_INLINE __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  return reinterpret_cast<__m512i>(reinterpret_cast<Words32>(a) >> n);
}
QUIRE_INLINE __m512i _mm512_mask_or_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  Ints result = to_ints(otherwise);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) result[i] = to_ints(a | b)[i];
  return from_ints(result);
}

// 16-bit lanes
QUIRE_INLINE __m512i _mm512_set1_epi16(short x) {
  return reinterpret_cast<__m512i>(Shorts{} + static_cast<uint16_t>(x));
}
QUIRE_INLINE __m512i _mm512_slli_epi16(__m512i a, unsigned n) {
  return reinterpret_cast<__m512i>(reinterpret_cast<Shorts>(a) << n);
}
QUIRE_INLINE __mmask32 _mm512_cmpeq_epi16_mask(__m512i a, __m512i b) {
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i)
    mask |= (reinterpret_cast<Shorts>(a)[i] == reinterpret_cast<Shorts>(b)[i] ? 1u : 0u) << i;
  return mask;
}
QUIRE_INLINE __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b) {
  Shorts result = reinterpret_cast<Shorts>(a);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) result[i] = reinterpret_cast<Shorts>(b)[i];
  return reinterpret_cast<__m512i>(result);
}

// ---- conversions
QUIRE_INLINE __m512 _mm512_cvtepi32_ps(__m512i a) {
  return __builtin_convertvector(to_ints(a), Lanes<64, float>);
}
QUIRE_INLINE __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return from_ints(__builtin_convertvector(reinterpret_cast<Lanes<16, int8_t>>(a), Ints));
}
QUIRE_INLINE __m512i _mm512_cvtepi8_epi16(__m256i a) {
  using Signed = Lanes<64, int16_t>;
  return reinterpret_cast<__m512i>(
      __builtin_convertvector(reinterpret_cast<Lanes<32, int8_t>>(a), Signed));
}
QUIRE_INLINE __m512i _mm512_cvtps_epi32(__m512 a) {  // to nearest even
  const auto convert = [](__m256 x) { return _mm256_castsi256_ps(_mm256_cvtps_epi32(x)); };
  return _mm512_castps_si512(by_halves(convert, a));
}
QUIRE_INLINE __m512i _mm512_cvtepu16_epi32(__m256i a) {
  const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a));
  const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1));
  return _mm512_castps_si512(join(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)));
}
QUIRE_INLINE __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return reinterpret_cast<__m256i>(__builtin_convertvector(to_ints(a), Lanes<32, int16_t>));
}
QUIRE_INLINE __m512 _mm512_cvtph_ps(__m256i a) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
QUIRE_INLINE __m256i _mm512_cvtps_ph(__m512 a, int) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(_mm512_extractf32x8_ps(a, 1), kNearest),
                          _mm256_cvtps_ph(_mm512_castps512_ps256(a), kNearest));
}

// ---- pairs of bfloat16
QUIRE_INLINE __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  BFloat16 pairs[32];
  for (int i = 0; i < 16; ++i) from_float(low[i], pairs[i]), from_float(high[i], pairs[16 + i]);
  __m512bh result;
  std::memcpy(&result, pairs, sizeof(result));
  return result;
}
QUIRE_INLINE __m512 even_elements(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
QUIRE_INLINE __m512 odd_elements(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
}
QUIRE_INLINE __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {  // odd elements first
  const __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  return _mm512_fmadd_ps(even_elements(x), even_elements(y),
                         _mm512_fmadd_ps(odd_elements(x), odd_elements(y), sum));
}
