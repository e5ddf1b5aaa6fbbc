// SPDX-License-Identifier: Apache-2.0
// simd.h for AVX2, FMA and F16C. Included inside the namespace and target region of the tier.
#pragma once

inline constexpr int kWidth = 8;
inline constexpr int kRegisters = 16;

struct Vec {
  __m256 v;
};

QUIRE_INLINE Vec in_register(Vec a) {
  asm("" : "+x"(a.v));
  return a;
}
QUIRE_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
QUIRE_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
QUIRE_INLINE Vec iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }

QUIRE_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
QUIRE_INLINE Vec widen(__m128i bits, BFloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
QUIRE_INLINE Vec widen(__m128i bits, Float16) { return {_mm256_cvtph_ps(bits)}; }
QUIRE_INLINE __m128i narrow(Vec a, Float16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
QUIRE_INLINE __m128i narrow(Vec a, BFloat16) {  // as from_float()
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16),
                                             _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

// e4m3 as float16: fraction and exponent keep their places, also of subnormals, which makes them
// 2^8 too small (kLoadUnit); NaN has to be made one.
QUIRE_INLINE __m256i halves(__m128i bytes) {
  const __m256i kept = _mm256_set1_epi16(static_cast<short>(0xbfff));
  const __m256i sign = _mm256_set1_epi16(static_cast<short>(0x8000));
  const __m256i x = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), kept);
  const __m256i nan =
      _mm256_cmpeq_epi16(_mm256_or_si256(x, sign), _mm256_set1_epi16(static_cast<short>(0xbf80)));
  return _mm256_or_si256(x, nan);
}
template <class T>
constexpr float kLoadUnit = 1;
template <>
inline constexpr float kLoadUnit<Float8E4M3> = 256;

QUIRE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
QUIRE_INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
template <class T>
QUIRE_INLINE Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
QUIRE_INLINE Vec load(const Int8* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
QUIRE_INLINE Vec load(const Float8E5M2* p) {  // the upper halves of float16
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return widen(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes), Float16{});
}
QUIRE_INLINE Vec load(const Float8E4M3* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return widen(_mm256_castsi256_si128(halves(bytes)), Float16{});
}
template <class T>
QUIRE_INLINE Vec load(const T* p, int n) {
  T part[8] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
constexpr bool kLoadsPairs = false;
template <>
inline constexpr bool kLoadsPairs<BFloat16> = true;  // saves the shuffle

template <class T>
QUIRE_INLINE void load2(const T* p, Vec* v) {
  v[0] = load(p);
  v[1] = load(p + kWidth);
}
QUIRE_INLINE void load2(const BFloat16* p, Vec* v) {
  const Vec pairs = in_register({_mm256_loadu_ps(reinterpret_cast<const float*>(p))});
  const __m256i bits = _mm256_castps_si256(pairs.v);
  v[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  v[1] = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)))};
}
QUIRE_INLINE void load2(const Float8E5M2* p, Vec* v) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  v[0] = widen(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes), Float16{});
  v[1] = widen(_mm_unpackhi_epi8(_mm_setzero_si128(), bytes), Float16{});
}
QUIRE_INLINE void load2(const Float8E4M3* p, Vec* v) {
  const __m256i words = halves(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  v[0] = widen(_mm256_castsi256_si128(words), Float16{});
  v[1] = widen(_mm256_extracti128_si256(words, 1), Float16{});
}
QUIRE_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
QUIRE_INLINE void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }
template <class T>
QUIRE_INLINE void store(T* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, T{}));
}
template <class T>
QUIRE_INLINE void store(T* p, Vec a, int n) {
  T part[8];
  store(part, a);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

QUIRE_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
QUIRE_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
QUIRE_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
QUIRE_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
QUIRE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
QUIRE_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
QUIRE_INLINE Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
QUIRE_INLINE Vec scale2(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
QUIRE_INLINE float first(Vec a) { return _mm256_cvtss_f32(a.v); }
QUIRE_INLINE float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
QUIRE_INLINE float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
QUIRE_INLINE Vec lane_sums(const Vec* a) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2)  // of a, b: a02 a13 b02 b13 in each 128 bits
    t[i] = _mm256_add_ps(_mm256_blend_ps(a[i].v, a[i + 1].v, 0xcc),
                         _mm256_shuffle_ps(a[i].v, a[i + 1].v, 0x4e));
  for (int i = 0; i < 8; i += 4)  // a b c d
    t[i] = _mm256_add_ps(_mm256_shuffle_ps(t[i], t[i + 2], 0x88),
                         _mm256_shuffle_ps(t[i], t[i + 2], 0xdd));
  return {
      _mm256_add_ps(_mm256_blend_ps(t[0], t[4], 0xf0), _mm256_permute2f128_ps(t[0], t[4], 0x21))};
}
QUIRE_INLINE void transpose(Vec* a) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {  // pairs of rows, then of pairs, then of 128-bit halves
    t[i] = _mm256_unpacklo_ps(a[i].v, a[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    a[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    a[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
QUIRE_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
