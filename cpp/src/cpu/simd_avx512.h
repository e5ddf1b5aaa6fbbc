// SPDX-License-Identifier: Apache-2.0
// simd.h for AVX-512 F, BW, DQ and VL. Included inside the namespace and target region of the tier.
#pragma once

inline constexpr int kWidth = 16;
inline constexpr int kRegisters = 32;

struct Vec {
  __m512 v;
};

QUIRE_INLINE Vec in_register(Vec a) {
#ifndef QUIRE_MODELLED  // a vector of the tests' model fills no register
  asm("" : "+v"(a.v));
#endif
  return a;
}
QUIRE_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
QUIRE_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
QUIRE_INLINE Vec iota() {
  return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}

QUIRE_INLINE __mmask16 first_lanes(int n) {
  return static_cast<__mmask16>((1u << n) - 1);  // n <= 16
}
QUIRE_INLINE Vec widen(__m256i bits, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
QUIRE_INLINE Vec widen(__m256i bits, Float16) { return {_mm512_cvtph_ps(bits)}; }
QUIRE_INLINE __m256i narrow(Vec a, Float16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
QUIRE_INLINE __m256i narrow(Vec a, BFloat16) {  // as from_float()
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), nan, high, _mm512_set1_epi32(0x40)));
}

// Bytes, sign-extended, as float16: e5m2 is its upper half; e4m3 keeps the places of its fraction
// and exponent, also of subnormals, which makes it 2^8 too small (kLoadUnit), and NaN has to be
// made one.
QUIRE_INLINE __m512i halves(__m512i words, Float8E5M2) { return _mm512_slli_epi16(words, 8); }
QUIRE_INLINE __m512i halves(__m512i words, Float8E4M3) {
  const __m512i nans = _mm512_set1_epi16(0x3f80);
  const __m512i kept = _mm512_set1_epi16(static_cast<short>(0xbfff));
  const __m512i x = _mm512_and_si512(_mm512_slli_epi16(words, 7), kept);
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, nans), nans);
  return _mm512_mask_blend_epi16(nan, x, _mm512_set1_epi16(0x7e00));
}
template <class T>
constexpr float kLoadUnit = 1;
template <>
inline constexpr float kLoadUnit<Float8E4M3> = 256;

QUIRE_INLINE Vec widen(__m128i bytes, Int8) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
template <class T>
QUIRE_INLINE Vec widen(__m128i bytes, T) {
  const __m512i wide = halves(_mm512_castsi256_si512(_mm256_cvtepi8_epi16(bytes)), T{});
  return widen(_mm512_castsi512_si256(wide), Float16{});
}

QUIRE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
QUIRE_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
template <class T>
QUIRE_INLINE Vec load(const T* p) {
  if constexpr (sizeof(T) == 1)
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
  else
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
QUIRE_INLINE Vec load(const T* p, int n) {
  if constexpr (sizeof(T) == 1)
    return widen(_mm_maskz_loadu_epi8(first_lanes(n), p), T{});
  else
    return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), T{});
}
template <class T>
constexpr bool kLoadsPairs = false;
template <>
inline constexpr bool kLoadsPairs<BFloat16> = true;  // saves the shuffle

template <class T>
QUIRE_INLINE void load2(const T* p, Vec* v) {
  if constexpr (sizeof(T) == 1 && !std::is_same_v<T, Int8>) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i wide = halves(_mm512_cvtepi8_epi16(bytes), T{});
    v[0] = widen(_mm512_castsi512_si256(wide), Float16{});
    v[1] = widen(_mm512_extracti64x4_epi64(wide, 1), Float16{});
  } else {
    v[0] = load(p);
    v[1] = load(p + kWidth);
  }
}
QUIRE_INLINE void load2(const BFloat16* p, Vec* v) {
  const __m512i pairs = _mm512_loadu_si512(p);
  v[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
  v[1] = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))};
}
QUIRE_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
QUIRE_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
template <class T>
QUIRE_INLINE void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <class T>
QUIRE_INLINE void store(T* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a, T{}));
}

QUIRE_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
QUIRE_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
QUIRE_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
QUIRE_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
QUIRE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
QUIRE_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
QUIRE_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
QUIRE_INLINE Vec scale2(Vec a, Vec n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)))};
}
QUIRE_INLINE float first(Vec a) { return _mm512_cvtss_f32(a.v); }
QUIRE_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
QUIRE_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
QUIRE_INLINE Vec lane_sums(const Vec* a) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2)  // of a, b: a02 b02 a13 b13 in each 128 bits
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[i].v, a[i + 1].v),
                         _mm512_unpackhi_ps(a[i].v, a[i + 1].v));
  for (int i = 0; i < 16; i += 4)  // a b c d
    t[i] = _mm512_add_ps(_mm512_shuffle_ps(t[i], t[i + 2], 0x44),
                         _mm512_shuffle_ps(t[i], t[i + 2], 0xee));
  for (int i = 0; i < 16; i += 8)  // abcd02 abcd13 efgh02 efgh13, those being the 128 bits
    t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[i], t[i + 4], 0x44),
                         _mm512_shuffle_f32x4(t[i], t[i + 4], 0xee));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[8], 0x88),
                        _mm512_shuffle_f32x4(t[0], t[8], 0xdd))};
}
QUIRE_INLINE void transpose(Vec* a) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    t[i] = _mm512_unpacklo_ps(a[i].v, a[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 within 128-bit lanes
    a[i].v = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    a[i + 1].v = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    a[i + 2].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    a[i + 3].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // the lanes themselves
    const __m512 x = _mm512_shuffle_f32x4(a[i].v, a[i + 4].v, 0x88);
    const __m512 y = _mm512_shuffle_f32x4(a[i].v, a[i + 4].v, 0xdd);
    const __m512 z = _mm512_shuffle_f32x4(a[i + 8].v, a[i + 12].v, 0x88);
    const __m512 w = _mm512_shuffle_f32x4(a[i + 8].v, a[i + 12].v, 0xdd);
    t[i] = _mm512_shuffle_f32x4(x, z, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(y, w, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(x, z, 0xdd);
    t[i + 12] = _mm512_shuffle_f32x4(y, w, 0xdd);
  }
  for (int i = 0; i < 16; ++i) a[i].v = t[i];
}
QUIRE_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
