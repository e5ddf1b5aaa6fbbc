// SPDX-License-Identifier: Apache-2.0
// What the codes of a quantised cache stand for. Codes are widened to float16 as they are, and
// multiplied by float16 queries: each row of those is brought near 1 by a power of two, which joins
// the scale of K in one factor a row, its unit. Scales of single tokens lie with the tile: those of
// K are multiplied into scores; those of V into weights, which is why the maximum of the softmax is
// then that of score + log2(scale): weights stay below 2, and float16 holds them.
#pragma once

#include "kernels/keys.h"

namespace quire::device {

inline constexpr float kLog2E = 1.44269504088896340736f;

// What all elements of the item are multiplied by, apart from their tokens' own scales.
QUIRE_DEVICE float item_scale(const KvScale& scale, int kv_head) {
  if (scale.is_per_token) return 1.0f;
  return scale.values ? ld_global(scale.values + kv_head * scale.stride_head) : scale.value;
}

// Sends the scale of one key on its way to shared memory, if tokens have their own.
QUIRE_DEVICE void load_token_scale(const KvScale& scale, const Item& item, Location at, bool exists,
                                   SharedAddress to) {
  if (!scale.is_per_token) return;
  const float* from = scale.values + at.block * scale.stride_block + at.row * scale.stride_row +
                      item.kv_head * scale.stride_head;
  cp_async<4>(to, from, exists ? 4 : 0);
}

// The scales of a tile's tokens in shared memory, two at a time.
struct TokenScales {
  SharedAddress first;
  bool exist;

  QUIRE_DEVICE F32x2 of_pair(int key) const { return ld_shared<F32x2>(first + key * 4); }
};

template <class Traits>
QUIRE_DEVICE TokenScales k_scales(const AttentionParams& p, SharedAddress stage) {
  return {stage + 2 * Traits::kKeyTileBytes, p.k_scale.is_per_token};
}
template <class Traits>
QUIRE_DEVICE TokenScales v_scales(const AttentionParams& p, SharedAddress stage) {
  return {stage + (2 * Traits::kKeyTileBytes + 4 * Traits::kKeys), p.v_scale.is_per_token};
}

// The power of two at or below a scale, as its logarithm; of one that is too small to matter, the
// least that keeps sums of weights finite.
QUIRE_DEVICE float log2_floor(float scale) {
  const int exponent = max(static_cast<int>(bits_of(scale) >> 23 & 255), 127 - 64);
  return float_of(0x4B000000u | static_cast<uint32_t>(exponent)) - (8388608.0f + 127.0f);
}

// From the scores of a kernel's queries and codes to those of attention: times `units` of the two
// rows and the tokens' own scales.
template <int kKeys>
QUIRE_DEVICE void scale_scores(const float (&units)[2], const TokenScales& tokens,
                               float (&scores)[kKeys / 8][4]) {
  const int lane_key = thread_index() % 4 * 2;
  QUIRE_UNROLL
  for (int n = 0; n < kKeys / 8; ++n) {
    const F32x2 token = tokens.exist ? tokens.of_pair(8 * n + lane_key) : F32x2{1.0f, 1.0f};
    QUIRE_UNROLL
    for (int h = 0; h < 2; ++h) {
      scores[n][2 * h] *= units[h] * token.x;
      scores[n][2 * h + 1] *= units[h] * token.y;
    }
  }
}

QUIRE_DEVICE SharedAddress unit_slot(int offset, int row) {
  return shared_base() + static_cast<uint32_t>(offset + row * 4);
}

// The units of the two rows that a thread has fragments of.
template <class Traits>
QUIRE_DEVICE void load_units(float (&units)[2], int first_row) {
  const int lane = thread_index() % kWarpSize;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h)
    units[h] = ld_shared<float>(unit_slot(Traits::kUnitOffset, first_row + lane / 4 + 8 * h));
}

template <class Type>
QUIRE_DEVICE void widen_piece(float (&values)[kPiece], SharedAddress from) {
  const U32x4 loaded = ld_shared<U32x4>(from);
  const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i)
    values[i] = widen<Type>(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
}

// Queries of a tile, which lie there as Type, become float16 of magnitude below 2, in the order of
// multiply_keys: of each 16 columns the even ones, then the odd ones. Their units are left in
// shared memory.
template <class Traits>
QUIRE_DEVICE void prepare_queries(const AttentionParams& p, const Item& item, SharedAddress tile) {
  using Type = typename Traits::Type;
  constexpr int kLanes = Traits::kThreads / Traits::kRows;  // of a warp, a row
  constexpr int kBytes = 2 * Traits::kHeadDim;
  const int row = thread_index() / kLanes, first = thread_index() % kLanes;
  float top = 0, a[kPiece], b[kPiece];
  for (int step = first; step < Traits::kHeadDim / kTile; step += kLanes) {
    widen_piece<Type>(a, tile + piece_offset<kBytes>(row, 2 * step));
    widen_piece<Type>(b, tile + piece_offset<kBytes>(row, 2 * step + 1));
    QUIRE_UNROLL
    for (int i = 0; i < kPiece; ++i) top = max(top, max(max(a[i], -a[i]), max(b[i], -b[i])));
  }
  QUIRE_UNROLL
  for (int other = 1; other < kLanes; other *= 2) top = max(top, shuffle_xor(top, other));
  const auto exponent =
      static_cast<uint32_t>(min(max(static_cast<int>(bits_of(top) >> 23), 1), 253));
  const float to_one = float_of((254 - exponent) << 23);
  for (int step = first; step < Traits::kHeadDim / kTile; step += kLanes) {
    const SharedAddress low = tile + piece_offset<kBytes>(row, 2 * step);
    const SharedAddress high = tile + piece_offset<kBytes>(row, 2 * step + 1);
    widen_piece<Type>(a, low);
    widen_piece<Type>(b, high);
    uint32_t even[4], odd[4];
    QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&piece)[kPiece] = i < 2 ? a : b;
      const int column = i % 2 * 4;
      even[i] = pack<Float16>(piece[column] * to_one, piece[column + 2] * to_one);
      odd[i] = pack<Float16>(piece[column + 1] * to_one, piece[column + 3] * to_one);
    }
    st_shared(low, U32x4{even[0], even[1], even[2], even[3]});
    st_shared(high, U32x4{odd[0], odd[1], odd[2], odd[3]});
  }
  if (first == 0) {
    const float factor = Traits::kMode == Mode::kFast ? p.scale * kLog2E : 1.0f;
    const float unit = mul(item_scale(p.k_scale, item.kv_head), factor);
    st_shared(unit_slot(Traits::kUnitOffset, row), mul(float_of(exponent << 23), unit));
  }
}

}  // namespace quire::device
