// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most: a loop of nothing but multiply-adds, and one of nothing but
// loads. Compiled by bench_attention.py for the machine it runs on.
#include <stddef.h>

typedef float vec __attribute__((vector_size(ROOF_VECTOR_BYTES), aligned(4)));
enum { kLanes = ROOF_VECTOR_BYTES / 4, kSums = 12 };

// Returns the floating-point operations done.
double roof_multiply_add(long rounds, float* sink) {
  vec sums[kSums];  // all different, or the compiler would keep but one
  for (int j = 0; j < kSums; ++j) sums[j] = (vec){0} + sink[0] * j;
  const vec a = (vec){0} + 0.5f, b = (vec){0} + sink[0];
  for (long i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) sums[j] = sums[j] * a + b;
  for (int j = 1; j < kSums; ++j) sums[0] += sums[j];
  sink[0] = sums[0][0];
  return 2.0 * rounds * kSums * kLanes;
}

// Returns the bytes read.
double roof_read(const float* data, size_t count, float* sink) {
  vec sums[4] = {{0}};
  size_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sums[j] += *(const vec*)(data + i + j * kLanes);
  sink[0] = (sums[0] + sums[1] + sums[2] + sums[3])[0];
  return 4.0 * i;
}
