// SPDX-License-Identifier: Apache-2.0
// Floats to the elements of a quantised cache: conversions without a branch (element.h), which the
// compiler turns into the tier's vectors. Included inside the namespace of the tier.
#pragma once

template <class T>
void quantise_as(const float* row, int64_t dim, float scale, T* to) {
  for (int64_t d = 0; d < dim; ++d) from_float(row[d] / scale, to[d]);
}

inline void quantise(const float* row, int64_t dim, float scale, ElementType type, void* to) {
  if (type == ElementType::kFloat8E4M3)
    return quantise_as(row, dim, scale, static_cast<Float8E4M3*>(to));
  if (type == ElementType::kFloat8E5M2)
    return quantise_as(row, dim, scale, static_cast<Float8E5M2*>(to));
  quantise_as(row, dim, scale, static_cast<Int8*>(to));
}
