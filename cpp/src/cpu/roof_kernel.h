// SPDX-License-Identifier: Apache-2.0
// The inner loops of roofs.h. Included inside the namespace of the tier.
#pragma once

// As many sums as registers hold beside the operands. Returns the floating-point operations done.
template <class W>
double multiply_add_words(int64_t rounds, float* sink) {
  constexpr int kSums = kRegisters == 32 ? 24 : 12;
  const float a = sink[0];
  const Vec b = set(a);
  Vec sums[kSums];
#pragma GCC unroll 24
  for (int j = 0; j < kSums; ++j) sums[j] = set(a * static_cast<float>(j));  // else all are one
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) sums[j] = W::multiply_add(&a, b, sums[j]);
#pragma GCC unroll 24
  for (int j = 1; j < kSums; ++j) sums[0] = add(sums[0], sums[j]);
  sink[0] = first(sums[0]);
  return 2.0 * static_cast<double>(rounds) * kSums * kWidth * W::kElements;
}

inline double multiply_adds(int64_t rounds, bool bfloat16_pairs, float* sink) {
  return bfloat16_pairs ? multiply_add_words<Words<BFloat16>>(rounds, sink)
                        : multiply_add_words<Words<float>>(rounds, sink);
}

inline float read_all(const float* data, int64_t count) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i + 4 * kWidth <= count; i += 4 * kWidth)
    for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], load(data + i + j * kWidth));
  return first(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}
