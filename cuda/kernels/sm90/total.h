// SPDX-License-Identifier: Apache-2.0
// Totals in global memory, which L2 keeps: where shared memory has no room for them. Every sum has
// its thread: a warp reads and writes 512 bytes in a row, and nothing is waited for but the warp's
// own.
#pragma once

#include "kernels/prefill.h"

namespace quire::device {

// kFragments times what each of kThreads threads has as sums[n]: columns 8n + lane % 4 * 2 and the
// next, of the rows lane / 4 and lane / 4 + 8 of its warp.
template <int kFragments_, int kThreads>
struct GlobalSums {
  static constexpr int kFragments = kFragments_;
  static constexpr int kAhead = 8;  // reads that are waited for at once

  float* block;  // the block's place

  QUIRE_DEVICE float* slot(int n, int thread) const { return block + (n * kThreads + thread) * 4; }

  // Adds `chunk`, whose [n] are the four sums of a fragment; the first one is the total. `low`: of
  // the thread's first row, `high`: of the other.
  template <class Chunk>
  QUIRE_DEVICE void fold_chunk(const Chunk& chunk, const FoldScales& low, const FoldScales& high,
                               bool is_first) const {
    auto* own = reinterpret_cast<F32x4*>(slot(0, fresh_thread_index()));
    QUIRE_UNROLL
    for (int first = 0; first < kFragments; first += kAhead) {
      F32x4 before[kAhead];
      QUIRE_UNROLL
      for (int a = 0; a < kAhead; ++a)
        before[a] = is_first ? F32x4{0, 0, 0, 0} : ld_global(own + (first + a) * kThreads);
      QUIRE_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const float (&sums)[4] = chunk[first + a];
        st_global(own + (first + a) * kThreads,
                  F32x4{low.apply(before[a].x, sums[0]), low.apply(before[a].y, sums[1]),
                        high.apply(before[a].z, sums[2]), high.apply(before[a].w, sums[3])});
      }
    }
  }

  // Eight columns of a row of a warp, after a sync of that.
  QUIRE_DEVICE void load(float (&values)[kPiece], int warp, int row, int column) const {
    const float* from = slot(column / kPiece, warp * kWarpSize + row % 8 * 4) + row / 8 * 2;
    QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const F32x2 pair = ld_global(reinterpret_cast<const F32x2*>(from + 4 * i));
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
  }
};

// As SharedTotal of kernels/prefill.h. After the sums lie the stats of their rows: they would be
// four registers.
template <class Traits>
struct GlobalTotal {
  using Sums = GlobalSums<Traits::kHeadDim / 8, Traits::kConsumerThreads>;

  Sums sums;

  QUIRE_DEVICE F32x4* own_stats() const {
    return reinterpret_cast<F32x4*>(sums.slot(Sums::kFragments, fresh_thread_index()));
  }

  QUIRE_DEVICE void fold_chunk(PrefillState<Traits>& state, bool is_first) const {
    F32x4* stats = own_stats();
    RowStats low_stats, high_stats;
    if (!is_first) {
      const F32x4 before = ld_global(stats);
      low_stats = {before.x, before.y}, high_stats = {before.z, before.w};
    }
    const FoldScales low = fold(low_stats, state.chunk[0]);
    const FoldScales high = fold(high_stats, state.chunk[1]);
    st_global(stats, F32x4{low_stats.max, low_stats.sum, high_stats.max, high_stats.sum});
    sums.fold_chunk(state.sums, low, high, is_first);
  }

  QUIRE_DEVICE void load_stats(PrefillState<Traits>& state) const {
    const F32x4 stats = ld_global(own_stats());
    state.total[0] = {stats.x, stats.y}, state.total[1] = {stats.z, stats.w};
  }

  QUIRE_DEVICE void load(float (&values)[kPiece], int row, int column) const {
    sums.load(values, row / kTile, row % kTile, column);
  }
};

template <class Traits>
QUIRE_DEVICE auto total_of(const AttentionArgs& args) {
  if constexpr (Traits::kIsLong)
    return GlobalTotal<Traits>{{args.totals + int64_t{block_index()} * (Traits::kGlobalBytes / 4)}};
  else
    return SharedTotal<Traits>{};
}

}  // namespace quire::device
