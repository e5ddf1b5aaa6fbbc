// SPDX-License-Identifier: Apache-2.0
// mla_decode of compute capability 9.0a, for sequences of many rows: attention over a latent cache,
// whose values are the first columns of its keys, by products of warpgroups.
//
// A block takes 64 rows. Sums of 512 columns are half of a multiprocessor's registers, so two
// warpgroups have 256 columns each and do nothing but add up weights times values. A third weighs:
// it multiplies queries and keys, has the softmax, and leaves weights in shared memory, two tiles
// in turn, from where both others multiply them; so the scores of a tile come about while the
// values of the one before are multiplied. The fourth brings tiles of keys, which serve both
// products. Bits of a row come about as in kernels/mla_decode.h: by chunks of kKvChunk keys, folded
// into a total, which lies in global memory.
#pragma once

#include "kernels/sm90/mla_sum.h"
#include "kernels/sm90/queries.h"

namespace quire::device {

// --- The warpgroup that weighs -------------------------------------------------------------------

// See BlockTeam.
struct ScoreTeam {
  static constexpr int kThreads = 4 * kWarpSize;
  QUIRE_DEVICE static int index() { return thread_index() % kThreads; }
  QUIRE_DEVICE static void sync(Site site = Site::here()) {
    sync_threads<kThreads>(kScoreBarrier, site);
  }
};

// scores[64 queries][kKeys] = queries x keys of the stage.
template <class Traits>
QUIRE_DEVICE void multiply_stage(float (&scores)[Traits::kKeys / 8][4], SharedAddress keys) {
  const SharedAddress queries = shared_base() + Traits::kQueryOffset;
  wgmma_fence();
  QUIRE_UNROLL
  for (int step = 0; step < Traits::kHeadDim / kTile; ++step) {
    const auto query = static_cast<uint32_t>(step / 4 * Traits::kRows * 128 + step % 4 * 32);
    const auto key = static_cast<uint32_t>(step / 4 * Traits::kColumnBytes + step % 4 * 32);
    wgmma<typename Traits::Type, Major::kK>(scores, describe_matrix(queries + query, 16, 1024),
                                            describe_matrix(keys + key, 16, 1024), step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
}

template <class Traits>
QUIRE_DEVICE void give_weights(const WeightSlots<Traits>& slots, const Rescale& rescale,
                               const float (&weights)[Traits::kKeys / 8][4]) {
  const int lane = fresh_thread_index() % kWarpSize;
  slots.template wait<Handover::kEmpty>();
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = own_row() + 8 * h;
    QUIRE_UNROLL
    for (int n = 0; n < Traits::kKeys / 8; ++n)
      st_shared(slots.piece(row, n) + static_cast<uint32_t>(lane % 4 * 4),
                pack<typename Traits::Type>(weights[n][2 * h], weights[n][2 * h + 1]));
    if (lane % 4 == 0) st_shared(slots.rescale(row), rescale.rows[h]);
  }
  fence_proxy_async();
  slots.template pass<Handover::kFull>();
}

// The end of a chunk, to those who sum: how it is folded. Of a split item, its stats to memory.
template <class Traits>
QUIRE_DEVICE void give_fold(const AttentionArgs& args, const Item& item, int first_row, int slot,
                            const FoldSlot<Traits>& folds, const RowStats (&chunk)[2], float factor,
                            RowStats (&total)[2]) {
  const bool is_first_lane = fresh_thread_index() % 4 == 0;
  folds.template wait<Handover::kEmpty>();
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int row = own_row() + 8 * h;
    const RowStats stats = chunk[h].finish(factor);
    const FoldScales scales = fold(total[h], stats);
    if (!is_first_lane) continue;
    st_shared(folds.row(row), F32x4{scales.total, scales.chunk, total[h].max, total[h].sum});
    if (slot >= 0 && first_row + row < item.num_rows)
      st_global(partial_stats(args, slot, first_row + row), F32x2{stats.max, stats.sum});
  }
  if (slot >= 0) fence_gpu();  // the others say to the last block that all is there
  folds.template pass<Handover::kFull>();
}

template <class Traits>
QUIRE_DEVICE void weigh_unit(const AttentionArgs& args, const MlaUnit& unit,
                             MlaTurns<Traits>& turns) {
  const AttentionParams& p = args.params;
  const Item item = load_item(args, unit.index);
  load_query_columns<Traits, ScoreTeam, 4>(args, item, unit.first_row);
  const float factor = score_factor<Traits>(p);
  const int last_row = min(item.num_rows, unit.first_row + Traits::kRows) - 1;
  ScoreRow rows[2];
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h)
    rows[h] = make_score_row(p, item, min(unit.first_row + own_row() + 8 * h, last_row));
  RowStats stats[2], total[2];
  for_each_chunk<Traits>(
      args, unit,
      [&](int tile) {
        float scores[Traits::kKeys / 8][4];
        turns.wait_keys();
        multiply_stage<Traits>(scores, turns.keys());
        turns.release_keys();
        mask_scores<Traits::kMode, Traits::kKeys>(p, rows, tile * Traits::kKeys, scores);
        const Rescale rescale = to_weights<Traits>(factor, TokenScales{}, stats, scores);
        give_weights<Traits>(turns.weights, rescale, scores);
        turns.advance();
      },
      [&](const Item& same, int slot, bool, bool) {
        give_fold<Traits>(args, same, unit.first_row, slot, turns.folds, stats, factor, total);
        ++turns.folds.turn;
        QUIRE_UNROLL
        for (RowStats& of_chunk : stats) of_chunk = RowStats{};
      });
}

// --- The block -----------------------------------------------------------------------------------

// Calls of_unit(unit) for each unit that the block is dealt.
template <class Traits, class OfUnit>
QUIRE_DEVICE void for_each_unit(const AttentionArgs& args, OfUnit of_unit) {
  ItemQueue<Traits> items;
  while (items.wait() != kNoItem) {
    const MlaUnit unit = unit_at<Traits>(args, items.current());
    if (unit.first_row < load_item(args, unit.index).num_rows) of_unit(unit);
    items.advance();
  }
}

template <class Traits>
QUIRE_DEVICE void init_mla_barriers() {
  if (thread_index() == 0) {
    constexpr int kWarps = 4;  // of a warpgroup
    Slots<Traits::kBarrierOffset, Traits::kStages>::template init<Handover::kFull>(kWarps);
    Slots<Traits::kBarrierOffset, Traits::kStages>::template init<Handover::kEmpty>(3 * kWarps);
    WeightSlots<Traits>::template init<Handover::kFull>(kWarps);
    WeightSlots<Traits>::template init<Handover::kEmpty>(2 * kWarps);
    FoldSlot<Traits>::template init<Handover::kFull>(kWarps);
    FoldSlot<Traits>::template init<Handover::kEmpty>(2 * kWarps);
    Slots<Traits::kItemOffset, Traits::kItemSlots>::template init<Handover::kFull>(1);
    Slots<Traits::kItemOffset, Traits::kItemSlots>::template init<Handover::kEmpty>(
        Traits::kThreads / kWarpSize);
    fence_mbarrier_init();
  }
  sync_block();
}

template <class Traits>
QUIRE_DEVICE void mla_decode_sm90(const BoxedAttentionArgs& boxed) {
  const AttentionArgs& args = boxed.attention;
  init_mla_barriers<Traits>();
  MlaTurns<Traits> turns;
  if (thread_index() >= Traits::kConsumerThreads) {
    decrease_registers<Traits::kProducerRegisters>();
    produce_units<Traits>(boxed);
  } else if (thread_index() >= Traits::kSumThreads) {
    decrease_registers<Traits::kScoreRegisters>();
    for_each_unit<Traits>(args,
                          [&](const MlaUnit& unit) { weigh_unit<Traits>(args, unit, turns); });
  } else {
    increase_registers<Traits::kSumRegisters>();
    for_each_unit<Traits>(args, [&](const MlaUnit& unit) {
      sum_unit<Traits>(args, unit, turns);
      const Item item = load_item(args, unit.index);
      if (item.merge >= 0) merge_unit<Traits>(args, item, unit);
    });
  }
}

}  // namespace quire::device
