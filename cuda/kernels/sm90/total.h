// SPDX-License-Identifier: Apache-2.0
// Where a block of sm90/prefill.h keeps `total`: in shared memory or, where that has no room, in
// global memory, which L2 keeps. There every sum has its thread: a warp reads and writes 512 bytes
// in a row, and nothing is waited for but the warp's own.
#pragma once

#include "kernels/prefill.h"

namespace quire::device {

// For each consumer [kHeadDim / 8] times what sums[n] holds, two columns of two rows, then the
// stats of these rows: they would be four registers.
template <class Traits>
struct GlobalTotal {
  static constexpr int kFragments = Traits::kHeadDim / 8;
  static constexpr int kAhead = 8;  // reads that are waited for at once

  float* block;  // the block's place

  QUIRE_DEVICE float* slot(int n, int thread) const {
    return block + (n * Traits::kConsumerThreads + thread) * 4;
  }

  // As SharedTotal folds.
  QUIRE_DEVICE void fold_chunk(PrefillState<Traits>& state, bool is_first) const {
    auto* own = reinterpret_cast<F32x4*>(slot(0, fresh_thread_index()));
    F32x4* stats = own + kFragments * Traits::kConsumerThreads;
    RowStats low_stats, high_stats;
    if (!is_first) {
      const F32x4 before = ld_global(stats);
      low_stats = {before.x, before.y}, high_stats = {before.z, before.w};
    }
    const FoldScales low = fold(low_stats, state.chunk[0]);
    const FoldScales high = fold(high_stats, state.chunk[1]);
    st_global(stats, F32x4{low_stats.max, low_stats.sum, high_stats.max, high_stats.sum});
    QUIRE_UNROLL
    for (int first = 0; first < kFragments; first += kAhead) {
      F32x4 before[kAhead];
      QUIRE_UNROLL
      for (int a = 0; a < kAhead; ++a)
        before[a] =
            is_first ? F32x4{0, 0, 0, 0} : ld_global(own + (first + a) * Traits::kConsumerThreads);
      QUIRE_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const float (&sums)[4] = state.sums[first + a];
        st_global(own + (first + a) * Traits::kConsumerThreads,
                  F32x4{low.apply(before[a].x, sums[0]), low.apply(before[a].y, sums[1]),
                        high.apply(before[a].z, sums[2]), high.apply(before[a].w, sums[3])});
      }
    }
  }

  QUIRE_DEVICE void load_stats(PrefillState<Traits>& state) const {
    const F32x4 stats =
        ld_global(reinterpret_cast<const F32x4*>(slot(kFragments, fresh_thread_index())));
    state.total[0] = {stats.x, stats.y}, state.total[1] = {stats.z, stats.w};
  }

  // Eight columns of a row of the warp, after a warp sync.
  QUIRE_DEVICE void load(float (&values)[kPiece], int row, int column) const {
    const float* from =
        slot(column / kPiece, row / kTile * kWarpSize + row % 8 * 4) + row / 8 % 2 * 2;
    QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const F32x2 pair = ld_global(reinterpret_cast<const F32x2*>(from + 4 * i));
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
  }
};

template <class Traits>
QUIRE_DEVICE auto total_of(const AttentionArgs& args) {
  if constexpr (Traits::kIsLong)
    return GlobalTotal<Traits>{args.totals + int64_t{block_index()} * (Traits::kGlobalBytes / 4)};
  else
    return SharedTotal<Traits>{};
}

}  // namespace quire::device
