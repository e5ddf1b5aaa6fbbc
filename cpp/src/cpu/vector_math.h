// SPDX-License-Identifier: Apache-2.0
// Elementary functions of vectors. Included inside the namespace of the tier.
#pragma once

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// (2^f - 1) / f for |f| <= 1/2: least squares, reweighted until the error of 2^f was even, 2e-9.
QUIRE_INLINE Vec exp2_slope(Vec f) {
  Vec p = set(1.5353362e-4f);
  p = fma(p, f, set(1.33988745e-3f));
  p = fma(p, f, set(9.61843736e-3f));
  p = fma(p, f, set(5.55033247e-2f));
  p = fma(p, f, set(2.402264791e-1f));
  return fma(p, f, set(6.931472029e-1f));
}

// 2^x for x <= 127; 0 below -127; exactly 1 for 0. NaN stays NaN.
QUIRE_INLINE Vec exp2(Vec x) {
  x = max(set(-127.0f), x);
  const Vec n = round(x);
  const Vec f = sub(x, n);
  return scale2(fma(exp2_slope(f), f, set(1.0f)), n);
}

QUIRE_INLINE float exp2(float x) { return first(exp2(set(x))); }

// tanh(x) = e / (e + 2) with e = exp(2x) - 1 put together so that nothing cancels near 0.
QUIRE_INLINE Vec tanh(Vec x) {
  const Vec limit = set(9.5f);  // tanh is 1 in float from 9.02 on
  const Vec bounded = max(sub(zero(), limit), sub(zero(), max(sub(zero(), limit), sub(zero(), x))));
  const Vec y = mul(bounded, set(2 * kLog2E));
  const Vec n = round(y);
  const Vec f = sub(y, n);
  const Vec power = scale2(set(1.0f), n);
  const Vec e = fma(power, mul(exp2_slope(f), f), sub(power, set(1.0f)));
  return div(e, add(e, set(2.0f)));
}
