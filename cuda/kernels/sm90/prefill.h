// SPDX-License-Identifier: Apache-2.0
// prefill of compute capability 9.0a: the last warpgroup brings tiles of keys and values to the
// stages of a ring (sm90/producer.h), the others multiply: 64 rows each, by products of warpgroups.
//
// What a warpgroup does with a tile overlaps twice: its products with the next keys are issued
// before those with the values of this tile, so that the softmax of the next scores runs beside the
// latter; and the warpgroups take turns in issuing, so that one has its softmax while the products
// of the other run. Bits of a row come about as in kernels/prefill.h: by chunks of kKvChunk keys,
// folded into `total`.
#pragma once

#include "kernels/sm90/queries.h"
#include "kernels/sm90/total.h"

namespace quire::device {

// --- Consumers -----------------------------------------------------------------------------------

// Named barriers. From kTurnBarrier on: one a warpgroup, where it waits for its turn.
inline constexpr int kConsumerBarrier = 1;
inline constexpr int kTurnBarrier = 2;

// See BlockTeam.
template <class Traits>
struct ConsumerTeam {
  static constexpr int kThreads = Traits::kConsumerThreads;
  // thread_index(), but that where sums take half of the registers nothing that follows from it is
  // kept in one: of the queries it would be the descriptors of all steps.
  QUIRE_DEVICE static int index() {
    return Traits::kIsLong ? fresh_thread_index() : thread_index();
  }
  QUIRE_DEVICE static void sync(Site site = Site::here()) {
    sync_threads<kThreads>(kConsumerBarrier, site);
  }
};

// The products of this warp that read the stage are done.
template <class Traits, Side kSide>
QUIRE_DEVICE void release_stage(const Ring<Traits>& ring) {
  if (thread_index() % kWarpSize == 0)
    mbarrier_arrive(ring.template barrier<kSide, Handover::kEmpty>());
}

// The warpgroups take turns in issuing products: while those of one run, the other has its softmax.
// Whoever comes first in a tile is ahead by half a tile from then on. No result depends on it.
template <class Traits>
QUIRE_DEVICE void take_turn() {
  sync_threads<2 * 128>(kTurnBarrier + thread_index() / 128);
}
template <class Traits>
QUIRE_DEVICE void give_turn() {
  static_assert(Traits::kConsumers == 2);
  arrive_threads<2 * 128>(kTurnBarrier + 1 - thread_index() / 128);
}

// Issues scores[64 queries][kKeys] = queries x keys of the stage, as a group.
template <class Traits>
QUIRE_DEVICE void issue_keys(float (&scores)[Traits::kKeys / 8][4], const Ring<Traits>& ring) {
  const SharedAddress queries =
      shared_base() + Traits::kQueryOffset +
      static_cast<uint32_t>(ConsumerTeam<Traits>::index() / 128 * 64 * 128);
  const SharedAddress keys = ring.template tile<Side::kKeys>();
  mbarrier_wait(ring.template barrier<Side::kKeys, Handover::kFull>(), ring.parity);
  wgmma_fence();
  QUIRE_UNROLL
  for (int step = 0; step < Traits::kKeyDim / kTile; ++step) {
    const auto query = static_cast<uint32_t>(step / 4 * Traits::kRows * 128 + step % 4 * 32);
    const auto key = static_cast<uint32_t>(step / 4 * Traits::kColumnBytes + step % 4 * 32);
    wgmma<typename Traits::Type, Major::kK>(scores, describe_matrix(queries + query, 16, 1024),
                                            describe_matrix(keys + key, 16, 1024), step > 0);
  }
  wgmma_commit();
}

// Weights as the left operand of a product.
template <class Traits>
struct Weights {
  uint32_t rounded[Traits::kKeys / kTile][4];

  QUIRE_DEVICE void round(const float (&weights)[Traits::kKeys / 8][4]) {
    QUIRE_UNROLL
    for (int n = 0; n < Traits::kKeys / 8; ++n) {
      rounded[n / 2][n % 2 * 2] = pack<typename Traits::Type>(weights[n][0], weights[n][1]);
      rounded[n / 2][n % 2 * 2 + 1] = pack<typename Traits::Type>(weights[n][2], weights[n][3]);
    }
  }
};

// Issues sums[64 queries][kHeadDim] += weights x values of the stage, as a group.
template <class Traits>
QUIRE_DEVICE void issue_values(float (&sums)[Traits::kHeadDim / 8][4],
                               const Weights<Traits>& weights, const Ring<Traits>& ring) {
  const SharedAddress values = ring.template tile<Side::kValues>();
  mbarrier_wait(ring.template barrier<Side::kValues, Handover::kFull>(), ring.parity);
  wgmma_fence();
  QUIRE_UNROLL
  for (int step = 0; step < Traits::kKeys / kTile; ++step)
    wgmma<typename Traits::Type, Major::kN>(
        sums, weights.rounded[step],
        describe_matrix(values + static_cast<uint32_t>(step * kTile * 128), Traits::kColumnBytes,
                        1024),
        true);
  wgmma_commit();
}

// What masks know of a warp's rows, in shared memory where sums leave no registers for it.
template <class Traits>
QUIRE_DEVICE SharedAddress masked_row_slot(int row) {
  const int warp = fresh_thread_index() / kWarpSize;
  return shared_base() + static_cast<uint32_t>(Traits::kRowOffset + (warp * kTile + row) * 32);
}

// `first_row`: of the warp. Called when the queries before are not in use any more.
template <class Traits>
QUIRE_DEVICE void store_masked_rows(const AttentionParams& p, const Item& item, int first_row,
                                    int last_row) {
  const int row = fresh_thread_index() % kWarpSize;
  if (row < kTile)
    store_score_row(masked_row_slot<Traits>(row),
                    make_score_row(p, item, min(first_row + row, last_row)));
  sync_warp();
}

template <class Traits, int kKeys>
QUIRE_DEVICE void mask_stored_rows(const AttentionParams& p, int first_key,
                                   float (&scores)[kKeys / 8][4]) {
  constexpr Mode kMode = Traits::kMode;
  const int row = fresh_thread_index() % kWarpSize / 4;
  const ScoreRow rows[2] = {load_score_row<kMode>(masked_row_slot<Traits>(row)),
                            load_score_row<kMode>(masked_row_slot<Traits>(row + 8))};
  mask_scores<kMode, kKeys>(p, rows, first_key, scores);
}

// A warpgroup's 64 rows of an item.
template <class Traits>
struct Consumer {
  static constexpr int kTilesPerChunk = kKvChunk / Traits::kKeys;

  const AttentionArgs& args;
  const ItemQueue<Traits>& items;
  int first_row;
  float factor;
  int chunk;  // the next to be finished
  PrefillState<Traits> state;

  // Every chunk of the item is finished, as in kernels/prefill.h.
  QUIRE_DEVICE void finish_chunks(int end) {
    if (chunk >= end) return;
    const Item item = load_item(args, items.current());
    for (; chunk < end; ++chunk)
      finish_chunk<Traits>(args, item, state, factor, chunk, chunk == item.kv_begin / kKvChunk,
                           first_row, total_of<Traits>(args));
  }

  // Scores of a tile to weights, relative to the maximum of their chunk so far.
  QUIRE_DEVICE Rescale weigh(int tile, RowStats (&stats)[2],
                             float (&scores)[Traits::kKeys / 8][4]) {
    QUIRE_UNROLL
    for (int h = 0; h < 2; ++h) stats[h] = tile % kTilesPerChunk == 0 ? RowStats{} : state.chunk[h];
    if constexpr (Traits::kIsLong)
      mask_stored_rows<Traits, Traits::kKeys>(args.params, tile * Traits::kKeys, scores);
    else  // true: told that kFast has no mask, ptxas spills 24 bytes at head dim 128
      mask_scores<Traits::kMode, Traits::kKeys, true>(args.params, state.rows, tile * Traits::kKeys,
                                                      scores);
    return to_weights<Traits>(factor, TokenScales{}, stats, scores);
  }

  // Takes over the weights of a tile. All before it has been multiplied.
  QUIRE_DEVICE void take(int tile, const Rescale& rescale, const RowStats (&stats)[2]) {
    finish_chunks(tile / kTilesPerChunk);
    rescale_sums<Traits>(rescale, state.sums);
    QUIRE_UNROLL
    for (int h = 0; h < 2; ++h) state.chunk[h] = stats[h];
  }

  // Tiles [begin, end). While the values of one are multiplied, the scores of the next become
  // weights.
  QUIRE_DEVICE void attend(int begin, int end, Ring<Traits>& ring) {
    if (begin >= end) return;
    float scores[Traits::kKeys / 8][4];
    RowStats stats[2];
    Weights<Traits> weights;
    issue_keys<Traits>(scores, ring);
    wgmma_wait<0>();
    release_stage<Traits, Side::kKeys>(ring);
    take(begin, weigh(begin, stats, scores), stats);
    weights.round(scores);
    for (int tile = begin + 1; tile < end; ++tile) {
      const Ring<Traits> before = ring;  // whose values are next
      ring.advance();
      take_turn<Traits>();
      issue_keys<Traits>(scores, ring);
      issue_values<Traits>(state.sums, weights, before);
      give_turn<Traits>();
      wgmma_wait<1>();
      release_stage<Traits, Side::kKeys>(ring);
      const Rescale rescale = weigh(tile, stats, scores);
      wgmma_wait<0>();
      release_stage<Traits, Side::kValues>(before);
      weights.round(scores);
      take(tile, rescale, stats);
    }
    issue_values<Traits>(state.sums, weights, ring);
    wgmma_wait<0>();
    release_stage<Traits, Side::kValues>(ring);
    ring.advance();
  }

  // Likewise, one after the other: for options, whose arithmetic takes longer than the products.
  // Those of one warpgroup run beside the arithmetic of the other, and their operands are no
  // registers while scores become weights.
  QUIRE_DEVICE void attend_in_order(int begin, int end, Ring<Traits>& ring) {
    for (int tile = begin; tile < end; ++tile) {
      float scores[Traits::kKeys / 8][4];
      Weights<Traits> weights;
      RowStats stats[2];
      issue_keys<Traits>(scores, ring);
      wgmma_wait<0>();
      release_stage<Traits, Side::kKeys>(ring);
      const Rescale rescale = weigh(tile, stats, scores);
      weights.round(scores);
      take(tile, rescale, stats);
      issue_values<Traits>(state.sums, weights, ring);
      wgmma_wait<0>();
      release_stage<Traits, Side::kValues>(ring);
      ring.advance();
    }
  }
};

// Rows [first_row, first_row + kRows) of the item.
template <class Traits>
QUIRE_DEVICE void consume_rows(const AttentionArgs& args, const ItemQueue<Traits>& items,
                               int first_row, Ring<Traits>& ring) {
  load_query_columns<Traits, ConsumerTeam<Traits>, 2>(args, load_item(args, items.current()),
                                                      first_row);
  const Item item = load_item(args, items.current());  // again: it is many registers
  const AttentionParams& p = args.params;
  const int thread = ConsumerTeam<Traits>::index();
  const int lane = thread % kWarpSize, warp_row = thread / kWarpSize * kTile;
  const int last_row = min(item.num_rows, first_row + Traits::kRows) - 1;
  const PrefillTiles<Traits> tiles(keys_to_read(p, item, first_row, last_row));
  const int first_chunk = item.kv_begin / kKvChunk;
  Consumer<Traits> consumer{args, items, first_row, score_factor<Traits>(p), first_chunk, {}};
  PrefillState<Traits>& state = consumer.state;
  if constexpr (Traits::kIsLong) {
    store_masked_rows<Traits>(p, item, first_row + warp_row, last_row);
  } else {
    QUIRE_UNROLL
    for (int h = 0; h < 2; ++h)
      state.rows[h] =
          make_score_row(p, item, min(first_row + warp_row + lane / 4 + 8 * h, last_row));
  }
  if constexpr (Traits::kMode == Mode::kFull)
    consumer.attend_in_order(tiles.begin, tiles.end, ring);
  else
    consumer.attend(tiles.begin, tiles.end, ring);
  const Item same = load_item(args, items.current());  // so that it is not kept so long
  consumer.finish_chunks(max(same.kv_begin / kKvChunk + 1, ceil_div(same.kv_end, kKvChunk)));
  if (same.partial >= 0) return;
  const auto total = total_of<Traits>(args);
  total.load_stats(state);
  write_total<Traits>(args, same, state, first_row, total);
}

// kConsumeRows: consume_rows<Traits> or what stands for it.
template <class Traits, auto kConsumeRows>
QUIRE_DEVICE void consume(const AttentionArgs& args) {
  Ring<Traits> ring;
  if (thread_index() >= 128) give_turn<Traits>();  // the first is that of the first warpgroup
  ItemQueue<Traits> items;
  while (items.wait() != kNoItem) {
    for (int row = 0; row < load_item(args, items.current()).num_rows; row += Traits::kRows)
      kConsumeRows(args, items, row, ring);
    const Item item = load_item(args, items.current());
    if (item.merge >= 0)
      merge_if_last<Traits>(args, item, shared_base() + Traits::kFlagOffset, all_rows(item),
                            ConsumerTeam<Traits>{});
    items.advance();
  }
  if (thread_index() < 128) take_turn<Traits>();  // the one that nobody has taken
}

template <class Traits>
QUIRE_DEVICE void init_barriers() {
  if (thread_index() == 0) {
    Ring<Traits> ring;
    for (ring.stage = 0; ring.stage < Traits::kStages; ++ring.stage) {
      mbarrier_init(ring.template barrier<Side::kKeys, Handover::kFull>(), 4);
      mbarrier_init(ring.template barrier<Side::kValues, Handover::kFull>(), 4);
      mbarrier_init(ring.template barrier<Side::kKeys, Handover::kEmpty>(), 4 * Traits::kConsumers);
      mbarrier_init(ring.template barrier<Side::kValues, Handover::kEmpty>(),
                    4 * Traits::kConsumers);
    }
    ItemQueue<Traits> items;
    for (; items.turn < Traits::kItemSlots; ++items.turn) {
      mbarrier_init(items.template barrier<Handover::kFull>(), 1);
      mbarrier_init(items.template barrier<Handover::kEmpty>(), Traits::kThreads / kWarpSize);
    }
    fence_mbarrier_init();
  }
  sync_block();
}

template <class Traits>
QUIRE_DEVICE void prefill_sm90(const BoxedAttentionArgs& args) {
  init_barriers<Traits>();
  if (thread_index() >= Traits::kConsumerThreads) {
    decrease_registers<Traits::kProducerRegisters>();
    produce<Traits>(args);
  } else {
    increase_registers<Traits::kConsumerRegisters>();
    consume<Traits, consume_rows<Traits>>(args.attention);
  }
}

}  // namespace quire::device
