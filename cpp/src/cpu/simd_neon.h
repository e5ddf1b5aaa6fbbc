// SPDX-License-Identifier: Apache-2.0
// simd.h for AArch64: what every ARMv8.0 CPU has. Included inside the namespace of the tier.
#pragma once

inline constexpr int kWidth = 4;
inline constexpr int kRegisters = 32;

struct Vec {
  float32x4_t v;
};

QUIRE_INLINE Vec in_register(Vec a) { return a; }
QUIRE_INLINE Vec zero() { return {vdupq_n_f32(0)}; }
QUIRE_INLINE Vec set(float x) { return {vdupq_n_f32(x)}; }
QUIRE_INLINE Vec iota() { return {float32x4_t{0, 1, 2, 3}}; }

QUIRE_INLINE Vec widen(uint16x4_t bits, BFloat16) {
  return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))};
}
QUIRE_INLINE Vec widen(uint16x4_t bits, Float16) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(bits))};
}
QUIRE_INLINE uint16x4_t narrow(Vec a, Float16) { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }
QUIRE_INLINE uint16x4_t narrow(Vec a, BFloat16) {  // as from_float()
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t high = vshrq_n_u32(bits, 16);
  const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
  const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t is_number = vceqq_f32(a.v, a.v);
  return vmovn_u32(vbslq_u32(is_number, vshrq_n_u32(sum, 16), vorrq_u32(high, vdupq_n_u32(0x40))));
}

// Four bytes, sign-extended.
QUIRE_INLINE int16x4_t extended(const void* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes))));
}
template <class T>
constexpr float kLoadUnit = 1;
template <>
inline constexpr float kLoadUnit<Float8E4M3> = 256;

QUIRE_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
template <class T>
QUIRE_INLINE Vec load(const T* p) {
  return widen(vld1_u16(&p->bits), T{});
}
QUIRE_INLINE Vec load(const Int8* p) { return {vcvtq_f32_s32(vmovl_s16(extended(p)))}; }
QUIRE_INLINE Vec load(const Float8E5M2* p) {  // the upper halves of float16
  return widen(vreinterpret_u16_s16(vshl_n_s16(extended(p), 8)), Float16{});
}
// As float16: fraction and exponent keep their places, also of subnormals, which makes them 2^8 too
// small (kLoadUnit); NaN has to be made one.
QUIRE_INLINE Vec load(const Float8E4M3* p) {
  const uint16x4_t nans = vdup_n_u16(0x3f80);
  const uint16x4_t x =
      vand_u16(vreinterpret_u16_s16(vshl_n_s16(extended(p), 7)), vdup_n_u16(0xbfff));
  const uint16x4_t is_nan = vceq_u16(vand_u16(x, nans), nans);
  return widen(vbsl_u16(is_nan, vdup_n_u16(0x7e00), x), Float16{});
}
template <class T>
QUIRE_INLINE Vec load(const T* p, int n) {
  T part[4] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
constexpr bool kLoadsPairs = false;
template <class T>
QUIRE_INLINE void load2(const T* p, Vec* v) {
  v[0] = load(p);
  v[1] = load(p + kWidth);
}
QUIRE_INLINE void store(float* p, Vec a) { vst1q_f32(p, a.v); }
template <class T>
QUIRE_INLINE void store(T* p, Vec a) {
  vst1_u16(&p->bits, narrow(a, T{}));
}
template <class T>
QUIRE_INLINE void store(T* p, Vec a, int n) {
  T part[4];
  store(part, a);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

QUIRE_INLINE Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
QUIRE_INLINE Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
QUIRE_INLINE Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
QUIRE_INLINE Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
QUIRE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
QUIRE_INLINE Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
QUIRE_INLINE Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
QUIRE_INLINE Vec scale2(Vec a, Vec n) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}
QUIRE_INLINE float first(Vec a) { return vgetq_lane_f32(a.v, 0); }
QUIRE_INLINE float sum(Vec a) { return vaddvq_f32(a.v); }
QUIRE_INLINE float largest(Vec a) { return vmaxvq_f32(a.v); }
QUIRE_INLINE Vec lane_sums(const Vec* a) {
  return {vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v))};
}
QUIRE_INLINE float64x2_t as_pairs(float32x4_t x) { return vreinterpretq_f64_f32(x); }
QUIRE_INLINE void transpose(Vec* a) {
  const float32x4_t t0 = vtrn1q_f32(a[0].v, a[1].v), t1 = vtrn2q_f32(a[0].v, a[1].v);
  const float32x4_t t2 = vtrn1q_f32(a[2].v, a[3].v), t3 = vtrn2q_f32(a[2].v, a[3].v);
  a[0].v = vreinterpretq_f32_f64(vtrn1q_f64(as_pairs(t0), as_pairs(t2)));
  a[1].v = vreinterpretq_f32_f64(vtrn1q_f64(as_pairs(t1), as_pairs(t3)));
  a[2].v = vreinterpretq_f32_f64(vtrn2q_f64(as_pairs(t0), as_pairs(t2)));
  a[3].v = vreinterpretq_f32_f64(vtrn2q_f64(as_pairs(t1), as_pairs(t3)));
}
QUIRE_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
