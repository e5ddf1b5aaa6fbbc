// SPDX-License-Identifier: Apache-2.0
// Pairs of bfloat16 multiplied by AMX tiles of 16 rows x 16 words: eight times the rate of
// vdpbf16ps. A tile sums the products of 16 words before it adds them to what it holds, so pieces
// of 16 words are counted from the start of the chunk: where they begin changes the bits.
// Included inside the namespace and target region of the tier, after words_bf16.h.
#pragma once

constexpr int kTile = 16;  // rows, and words a row

template <>
struct Words<BFloat16> : BFloat16Pairs {
  using Products = Words;
  static constexpr int kRows = 2 * kTile;
  static constexpr int kRowStep = kTile;
  static constexpr int kDepthStep = kTile;

  // All eight tiles at their full size; the thread's tile state is given up in the end, or the
  // operating system would save it at every switch.
  struct Unit {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Unit() {
      static constexpr Config config;
      _tile_loadconfig(&config);
    }
    Unit(const Unit&) = delete;
    Unit& operator=(const Unit&) = delete;
    ~Unit() { _tile_release(); }
  };
};

// As that of prefill.h, for depths that are multiples of kTile. Tiles 0 to 3 are the sums (two
// rows of tiles x two columns), 4 and 5 of a, 6 and 7 of b.
template <int M, class W, class Finish>
  requires(W::kDepthStep == kTile)
QUIRE_INLINE void multiply_tile(const float* a, int a_stride, const float* b, int depth,
                                Finish finish) {
  static_assert(M == kTile || M == 2 * kTile);
  alignas(64) float sums[M][kPanel];
  const float* a_low = a + (M - kTile) * a_stride;
  const int64_t a_bytes = int64_t{a_stride} * 4;
  constexpr int64_t kPanelBytes = kPanel * 4;
  asm volatile("" ::: "memory");  // what was stored must be there: tile loads do not say they read
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (M > kTile) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < depth; k += kTile, b += kTile * kPanel) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b, kPanelBytes);
    _tile_loadd(7, b + kTile, kPanelBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (M > kTile) {
      _tile_loadd(5, a_low + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], kPanelBytes);
  _tile_stored(1, sums[0] + kTile, kPanelBytes);
  if constexpr (M > kTile) {
    _tile_stored(2, sums[kTile], kPanelBytes);
    _tile_stored(3, sums[kTile] + kTile, kPanelBytes);
  }
  for (int i = 0; i < M; ++i) {
    const Vec row[2] = {load(sums[i]), load(sums[i] + kWidth)};
    finish(i, row);
  }
}
