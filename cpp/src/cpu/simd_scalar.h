// SPDX-License-Identifier: Apache-2.0
// simd.h in portable C++: four floats that a compiler may keep in one register.
// Included inside the namespace of the tier.
#pragma once

inline constexpr int kWidth = 4;
inline constexpr int kRegisters = 16;

struct Vec {
  float v[4];
};

template <class F>
QUIRE_INLINE Vec map(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

QUIRE_INLINE Vec in_register(Vec a) { return a; }
QUIRE_INLINE Vec zero() { return {{0, 0, 0, 0}}; }
QUIRE_INLINE Vec set(float x) { return {{x, x, x, x}}; }
QUIRE_INLINE Vec iota() { return {{0, 1, 2, 3}}; }

template <class T>
QUIRE_INLINE Vec load(const T* p) {
  return map([&](int i) { return to_float(p[i]); });
}
template <class T>
QUIRE_INLINE Vec load(const T* p, int n) {
  return map([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
template <class T>
constexpr bool kLoadsPairs = false;
template <class T>
QUIRE_INLINE void load2(const T* p, Vec* v) {
  v[0] = load(p);
  v[1] = load(p + kWidth);
}
template <class T>
constexpr float kLoadUnit = 1;
template <class T>
QUIRE_INLINE void store(T* p, Vec a, int n = 4) {
  for (int i = 0; i < n; ++i) from_float(a.v[i], p[i]);
}

QUIRE_INLINE Vec add(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] + b.v[i]; });
}
QUIRE_INLINE Vec sub(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] - b.v[i]; });
}
QUIRE_INLINE Vec mul(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] * b.v[i]; });
}
QUIRE_INLINE Vec div(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] / b.v[i]; });
}
QUIRE_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
QUIRE_INLINE Vec max(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
QUIRE_INLINE Vec round(Vec a) {  // |a| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction
  return map([&](int i) { return (a.v[i] + 0x1.8p23f) - 0x1.8p23f; });
}
QUIRE_INLINE Vec scale2(Vec a, Vec n) {
  return map([&](int i) {
    const int32_t exponent = n.v[i] > -127 ? static_cast<int32_t>(n.v[i]) + 127 : 0;
    return a.v[i] * std::bit_cast<float>(exponent << 23);
  });
}
QUIRE_INLINE float first(Vec a) { return a.v[0]; }
QUIRE_INLINE float sum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
QUIRE_INLINE float largest(Vec a) {
  const float low = a.v[0] > a.v[1] ? a.v[0] : a.v[1];
  const float high = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return low > high ? low : high;
}
QUIRE_INLINE Vec lane_sums(const Vec* a) {
  return map([&](int i) { return sum(a[i]); });
}
QUIRE_INLINE void transpose(Vec* a) {
  for (int i = 0; i < 4; ++i)
    for (int j = i + 1; j < 4; ++j) std::swap(a[i].v[j], a[j].v[i]);
}
QUIRE_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
