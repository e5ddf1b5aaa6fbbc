// SPDX-License-Identifier: Apache-2.0
// The matrix products of backward_kernel.h: register tiles of sums over panels of floats.
// Included inside the namespace of the tier.
#pragma once

// kMicroRows x kPanel sums of products.
struct ProductTile {
  Vec sums[kMicroRows][2];

  QUIRE_INLINE void clear() {
#pragma GCC unroll 12
    for (int i = 0; i < kMicroRows; ++i) sums[i][0] = sums[i][1] = zero();
  }
  // Adds a[kMicroRows][depth] * b[depth][kPanel]; element (i, k) of a is a[i * row + k * step].
  QUIRE_INLINE void add(const float* a, int row, int step, const float* b, int depth) {
    for (int k = 0; k < depth; ++k, a += step, b += kPanel) {
      const Vec b0 = load(b), b1 = load(b + kWidth);
#pragma GCC unroll 12
      for (int i = 0; i < kMicroRows; ++i) {
        const Vec x = set(a[i * row]);
        sums[i][0] = fma(x, b0, sums[i][0]);
        sums[i][1] = fma(x, b1, sums[i][1]);
      }
    }
  }
};

// A matrix of `height` rows in panels of kPanel columns, zeros beyond the last.
struct Panels {
  float* data;
  int height;
  int columns;

  static size_t size(int height, int columns) { return padded(int64_t{height} * width(columns)); }
  static int width(int columns) { return (columns + kPanel - 1) / kPanel * kPanel; }
  float* at(int row, int column) const {
    return data + (static_cast<int64_t>(column / kPanel) * height + row) * kPanel + column % kPanel;
  }
  int num_panels() const { return width(columns) / kPanel; }

  template <class T>
  void set_row(int row, const T* from, float factor) const {
    for (int d = 0; d < width(columns); d += kWidth)
      store(at(row, d), mul(set(factor), load_some(from + d, columns - d)));
  }
  void clear_rows(int begin, int end) const {
    for (int d = 0; d < width(columns); d += kPanel)
      std::fill(at(begin, d), at(begin, d) + (end - begin) * kPanel, 0.0f);
  }
  template <class T>
  QUIRE_INLINE static Vec load_some(const T* from, int n) {
    return n >= kWidth ? load(from) : n > 0 ? load(from, n) : zero();
  }
};
