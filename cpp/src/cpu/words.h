// SPDX-License-Identifier: Apache-2.0
// What prefill multiplies: words of 32 bits, here a float each. A tier whose products take pairs
// of 16-bit elements specialises this for them. Included inside the namespace of the tier.
#pragma once

constexpr int kMicroRows = kRegisters == 32 ? 12 : 6;  // rows of a register tile
constexpr int kPanel = 2 * kWidth;                     // its columns

// The sizes of products by vector instructions.
struct VectorProducts {
  static constexpr int kRows = kMicroRows;         // at most
  static constexpr int kRowStep = kMicroRows / 3;  // fewer are rounded up to one or two of these
  static constexpr int kDepthStep = 1;             // words of a row that are multiplied at a time
  struct Unit {};                                  // lives as long as an item's products
};

// Products of words of a float each.
struct FloatWords : VectorProducts {
  static constexpr int kElements = 1;           // of a word
  static constexpr bool kScalesLogits = false;  // the scale is applied to q, not to the product

  // sum + a * b for one word and a vector of words.
  QUIRE_INLINE static Vec multiply_add(const float* a, Vec b, Vec sum) {
    return fma(set(*a), b, sum);
  }
  // Turns weights s[begin, end) into words from s[begin / kElements] on.
  QUIRE_INLINE static void pack_weights(float*, int, int) {}
};

template <class T>
struct Words : FloatWords {
  using Products = FloatWords;  // what multiplies them; compiled once for all types that share it

  // A vector of words from the first n elements at p, then zeros.
  QUIRE_INLINE static Vec load_words(const T* p, int n) {
    return n >= kWidth ? load(p) : load(p, n);
  }
  // A vector of words, each of the kElements rows' elements in one column; n columns, then zeros.
  QUIRE_INLINE static Vec load_columns(const T* const* rows, int column, int n) {
    return load_words(rows[0] + column, n);
  }
};
