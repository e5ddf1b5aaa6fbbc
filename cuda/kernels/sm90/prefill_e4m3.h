// SPDX-License-Identifier: Apache-2.0
// prefill of compute capability 9.0a where queries, keys and values all are codes of e4m3: both
// products are of codes, at twice the rate of 16-bit ones. As sm90/prefill.h but for this:
//
// - Such products want values with keys along the rows of shared memory. The producer turns each
//   tile of values in place, 16 keys times 16 columns at a time, one tile behind what it brings.
//   Keys come to lie in the order in which a thread has its weights, and even columns before odd
//   ones, which column_pair() undoes.
// - Weights are rounded to e4m3, 2^kWeightShift times as large, so that more of them are more than
//   its least code. Maxima are that much less where a chunk ends: nothing else is to know.
// - The sums of such products keep some 14 bits of their fraction. Those of kFlushKeys keys are
//   added to floats, which takes no instruction more: it is the one that rescales them.
#pragma once

#include "kernels/sm90/prefill.h"
#include "prim/sm90_e4m3.h"

namespace quire::device {

// Weights are at most 2^7, and times the scale of a token, which is taken relative to its power of
// two, less than 2^8; the largest code is 448.
inline constexpr int kWeightShift = 7;

template <class Traits>
QUIRE_DEVICE TokenScales token_scales(const Ring<Traits>& ring, Side side, const KvScale& scale) {
  const int place =
      (static_cast<int>(ring.parity) * Traits::kStages + ring.stage) * 2 + static_cast<int>(side);
  return {shared_base() + static_cast<uint32_t>(Traits::kScaleOffset + place * Traits::kKeys * 4),
          scale.is_per_token};
}

// --- Producer ------------------------------------------------------------------------------------

// Of 16 keys times 16 columns that `low` and `high` hold, eight keys each: to rows of columns.
QUIRE_DEVICE void store_turned(SharedAddress tile, uint32_t low, uint32_t high, int keys,
                               int columns) {
  const int lane = fresh_thread_index() % kWarpSize, row = 16 * columns + lane / 4;
  const auto word = static_cast<uint32_t>(lane % 4 * 4);
  uint32_t even, odd;
  part_bytes(low, high, even, odd);
  st_shared(tile + (piece_offset<128>(row, keys) + word), even);
  st_shared(tile + (piece_offset<128>(row + 8, keys) + word), odd);
}

// Two blocks of 16 times 16 to where they belong: to each other's places, to their own, or to
// places that hold nothing.
QUIRE_DEVICE void turn_blocks(SharedAddress tile, int keys, int columns, int other_keys,
                              int other_columns) {
  const int lane = fresh_thread_index() % kWarpSize;
  const bool is_other = lane >= 16;  // whose rows this lane names
  uint32_t codes[4];
  ldmatrix<Transposed::kYes>(
      codes, tile + piece_offset<128>(16 * (is_other ? other_keys : keys) + lane % 16,
                                      is_other ? other_columns : columns));
  sync_warp();  // both have been read before either is overwritten
  store_turned(tile, codes[0], codes[1], keys, columns);
  store_turned(tile, codes[2], codes[3], other_keys, other_columns);
}

// Turns a warp's share of [128 keys][kHeadDim columns] to [kHeadDim columns][128 keys]. As many
// keys as columns are a square, whose blocks change places, or stay on the diagonal; those of keys
// beyond it go where there are no columns. In a row of 16 columns the even ones come first; in 16
// keys, 2t, 2t + 1, 8 + 2t, 9 + 2t for t = 0 ... 3.
template <class Traits>
QUIRE_DEVICE void turn_values(SharedAddress tile) {
  constexpr int kBlocks = Traits::kHeadDim / 16, kPairs = kBlocks * kBlocks / 8;  // of a warp
  const int warp = fresh_thread_index() / kWarpSize % 4;
  QUIRE_UNROLL_BY(2)
  for (int i = 0; i < kPairs; ++i) {
    const int pair = warp * kPairs + i, first = pair % kBlocks, distance = pair / kBlocks + 1;
    const bool is_diagonal = distance == kBlocks / 2 && first >= kBlocks / 2;
    const int a = is_diagonal ? 2 * first - kBlocks : first;
    const int b = is_diagonal ? a + 1 : (first + distance) % kBlocks;
    turn_blocks(tile, a, is_diagonal ? a : b, b, is_diagonal ? b : a);
  }
  if constexpr (kBlocks == 4)
    for (int i = 0; i < 4; i += 2) turn_blocks(tile, 4 + warp, i, 4 + warp, i + 1);
}

template <class Traits>
struct TurningProducer : Producer<Traits> {
  // The values of a stage, once all of them have landed.
  QUIRE_DEVICE void turn(const Ring<Traits>& ring) {
    mbarrier_wait(ring.template barrier<Side::kValues, Handover::kLanded>(), ring.parity);
    turn_values<Traits>(ring.template tile<Side::kValues>());
    fence_proxy_async();
    sync_warp();
    if (thread_index() % kWarpSize == 0)
      mbarrier_arrive(ring.template barrier<Side::kValues, Handover::kFull>());
  }

  // Those of the lane's key. Its stage's keys tell the consumers of them.
  QUIRE_DEVICE void load_scales(int row, int tile) {
    const AttentionParams& p = this->args.attention.params;
    if (!p.k_scale.is_per_token && !p.v_scale.is_per_token) return;
    const Item item = this->item();
    const KeyRange keys = this->keys_of(item, row);
    const int place = fresh_thread_index() % 128, key = tile * Traits::kKeys + place;
    const Location at = locate(p, item, keys, key);
    const bool exists = key >= keys.begin && key < keys.end;
    const auto load = [&](Side side, const KvScale& scale) {
      if (!scale.is_per_token) return;
      const int64_t offset = at.block * scale.stride_block + at.row * scale.stride_row +
                             item.kv_head * scale.stride_head;
      st_shared(token_scales(this->ring, side, scale).first + static_cast<uint32_t>(place * 4),
                exists ? ld_global(scale.values + offset) : 1.0f);
    };
    mbarrier_wait(this->ring.template barrier<Side::kKeys, Handover::kEmpty>(),
                  this->ring.parity ^ 1);
    load(Side::kKeys, p.k_scale);
    load(Side::kValues, p.v_scale);
    sync_warp();
  }

  QUIRE_DEVICE void load_tiles(int row, const PrefillTiles<Traits>& tiles) {
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      load_scales(row, tile);
      this->template load<Side::kKeys>(row, tile);
      this->template load<Side::kValues>(row, tile);
      if (tile > tiles.begin) turn(this->ring.previous());
      this->ring.advance();
    }
    this->template publish<0>();
    if (tiles.begin < tiles.end) turn(this->ring.previous());
  }
};

// --- Consumers -----------------------------------------------------------------------------------

// A warp's 16 queries as left operands of products.
template <class Traits>
struct QueryCodes {
  static constexpr int kSteps = Traits::kKeyDim / 32;
  uint32_t steps[kSteps][4];

  // Rows [first_row, first_row + 16), by way of the warp's `total`.
  QUIRE_DEVICE void load(const AttentionArgs& args, const Item& item, int first_row) {
    constexpr int kPieces = Traits::kKeyDim / kPieceBytes;
    const AttentionParams& p = args.params;
    const auto* q = static_cast<const uint8_t*>(p.q) + item.sequence_index * p.q_stride_seq;
    const int thread = fresh_thread_index();
    const int lane = thread % kWarpSize, warp = thread / kWarpSize;
    const SharedAddress tile =
        shared_base() +
        static_cast<uint32_t>(Traits::kTotalOffset + warp * kTile * Traits::kHeadDim * 4);
    sync_warp();  // the rows before have been written
    QUIRE_UNROLL_BY(2)
    for (int i = lane; i < kTile * kPieces; i += kWarpSize) {
      const int row = i / kPieces, piece = i % kPieces;
      const bool exists = first_row + row < item.num_rows;
      const int source = exists ? first_row + row : 0;
      const int64_t offset = item.batch_row(source) * p.q_stride_row +
                             item.head(source) * p.q_stride_head + piece * kPieceBytes;
      load_piece<Traits::kMode>(tile + piece_offset<Traits::kKeyDim>(row, piece), q + offset,
                                exists ? p.head_dim - piece * kPieceBytes : 0, args.is_aligned);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_warp();
    QUIRE_UNROLL
    for (int s = 0; s < kSteps; ++s)
      ldmatrix<Transposed::kNo>(
          steps[s], tile + piece_offset<Traits::kKeyDim>(lane % kTile, 2 * s + lane / kTile));
    sync_warp();  // before `total` takes their place
  }
};

// A warpgroup's 64 rows of an item. Part 2 t + i is half i of tile t.
template <class Traits>
struct CodeConsumer {
  static constexpr int kKeys = Traits::Half::kKeys;
  static constexpr int kPartsPerChunk = kKvChunk / kKeys;
  using Scores = float[kKeys / 8][4];
  using Sums = float[Traits::kHeadDim / 8][4];

  const AttentionArgs& args;
  const ItemQueue<Traits>& items;
  int first_row;
  float factor;  // of scores, apart from their tokens' own scales
  int chunk;     // the next to be finished
  PrefillState<Traits> state;
  QueryCodes<Traits> queries;
  uint32_t weights[kKeys / 32][4];

  // Scores are taken as they come, and `factor` joins the exponential.
  QUIRE_DEVICE bool is_raw() const {
    return Traits::kMode == Mode::kFast && !args.params.k_scale.is_per_token &&
           !args.params.v_scale.is_per_token && factor > 0;
  }

  // Every chunk of the item is finished, as in kernels/prefill.h.
  QUIRE_DEVICE void finish_chunks(int end) {
    if (chunk >= end) return;
    const Item item = load_item(args, items.current());
    const float unit = is_raw() ? factor : 1.0f;
    for (; chunk < end; ++chunk) {
      QUIRE_UNROLL
      for (int h = 0; h < 2; ++h) state.chunk[h].max = mul(state.chunk[h].max, unit) - kWeightShift;
      finish_chunk<Traits>(args, item, state, 1.0f, chunk, chunk == item.kv_begin / kKvChunk,
                           first_row);
    }
  }

  // Issues scores[64 queries][kKeys] = queries x keys, as a group.
  QUIRE_DEVICE void issue_keys(Scores& scores, const Ring<Traits>& ring, int part) {
    const SharedAddress keys =
        ring.template tile<Side::kKeys>() + static_cast<uint32_t>(part % 2 * kKeys * 128);
    if (part % 2 == 0)
      mbarrier_wait(ring.template barrier<Side::kKeys, Handover::kFull>(), ring.parity);
    wgmma_fence();
    QUIRE_UNROLL
    for (int s = 0; s < Traits::kKeyDim / 32; ++s)
      wgmma_e4m3(scores, queries.steps[s],
                 describe_matrix(keys + static_cast<uint32_t>(32 * s), 16, 1024), s > 0);
    wgmma_commit();
  }

  // Issues sums[64 queries][kHeadDim] = weights x values, as a group.
  QUIRE_DEVICE void issue_values(Sums& sums, const Ring<Traits>& ring, int part) {
    const SharedAddress values =
        ring.template tile<Side::kValues>() + static_cast<uint32_t>(part % 2 * kKeys);
    if (part % 2 == 0)
      mbarrier_wait(ring.template barrier<Side::kValues, Handover::kFull>(), ring.parity);
    wgmma_fence();
    QUIRE_UNROLL
    for (int s = 0; s < kKeys / 32; ++s)
      wgmma_e4m3(sums, weights[s],
                 describe_matrix(values + static_cast<uint32_t>(32 * s), 16, 1024), s > 0);
    wgmma_commit();
  }

  // Scores to weights, relative to the maximum of their chunk so far.
  QUIRE_DEVICE Rescale weigh(const Ring<Traits>& ring, int part, RowStats (&stats)[2],
                             Scores& scores) {
    const AttentionParams& p = args.params;
    const auto of_part = [part](TokenScales scales) {
      return TokenScales{scales.first + static_cast<uint32_t>(part % 2 * kKeys * 4), scales.exist};
    };
    QUIRE_UNROLL
    for (int h = 0; h < 2; ++h) stats[h] = part % kPartsPerChunk == 0 ? RowStats{} : state.chunk[h];
    const bool raw = is_raw();
    const float units[2] = {factor, factor};
    if (!raw)
      scale_scores<kKeys>(units, of_part(token_scales(ring, Side::kKeys, p.k_scale)), scores);
    mask_stored_rows<Traits, kKeys>(p, part * kKeys, scores);
    return to_weights<typename Traits::Half, kWeightShift>(
        raw ? factor : 1.0f, of_part(token_scales(ring, Side::kValues, p.v_scale)), stats, scores);
  }

  QUIRE_DEVICE void round(const Scores& scores) {
    QUIRE_UNROLL
    for (int s = 0; s < kKeys / 32; ++s) QUIRE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&a)[4] = scores[4 * s + i / 2 * 2], (&b)[4] = scores[4 * s + i / 2 * 2 + 1];
      const int h = i % 2 * 2;
      weights[s][i] = pack_e4m3(a[h], a[h + 1], b[h], b[h + 1]);
    }
  }

  // To sums of floats, which were relative to another maximum.
  QUIRE_DEVICE void add(const Rescale& rescale, const Sums& sums) {
    QUIRE_UNROLL
    for (int n = 0; n < Traits::kHeadDim / 8; ++n) QUIRE_UNROLL
    for (int e = 0; e < 4; ++e)
      state.sums[n][e] = fma(state.sums[n][e], rescale.rows[e / 2], sums[n][e]);
  }

  // Parts [begin, end), both even. While the values of one are multiplied, the scores of the next
  // become weights.
  QUIRE_DEVICE void attend(int begin, int end, Ring<Traits>& ring) {
    if (begin >= end) return;
    Scores scores;
    Sums sums;
    RowStats stats[2];
    issue_keys(scores, ring, begin);
    wgmma_wait<0>();
    Rescale rescale = weigh(ring, begin, stats, scores);
    take(begin, stats);
    round(scores);
    for (int part = begin + 1; part < end; ++part) {
      if (part % 2 == 0) ring.advance();
      const Ring<Traits> before = part % 2 == 0 ? ring.previous() : ring;  // whose values are next
      take_turn<Traits>();
      issue_keys(scores, ring, part);
      issue_values(sums, before, part - 1);
      give_turn<Traits>();
      wgmma_wait<1>();
      if (part % 2 == 1) release_stage<Traits, Side::kKeys>(ring);
      const Rescale next = weigh(ring, part, stats, scores);
      wgmma_wait<0>();
      if (part % 2 == 0) release_stage<Traits, Side::kValues>(before);
      add(rescale, sums);
      take(part, stats);
      round(scores);
      rescale = next;
    }
    issue_values(sums, ring, end - 1);
    wgmma_wait<0>();
    release_stage<Traits, Side::kValues>(ring);
    add(rescale, sums);
    ring.advance();
  }

  // Likewise, one after the other, as in sm90/prefill.h: no sums are in flight while scores become
  // weights.
  QUIRE_DEVICE void attend_in_order(int begin, int end, Ring<Traits>& ring) {
    for (int part = begin; part < end; ++part) {
      Scores scores;
      RowStats stats[2];
      issue_keys(scores, ring, part);
      wgmma_wait<0>();
      if (part % 2 == 1) release_stage<Traits, Side::kKeys>(ring);
      const Rescale rescale = weigh(ring, part, stats, scores);
      take(part, stats);
      round(scores);
      Sums sums;
      issue_values(sums, ring, part);
      wgmma_wait<0>();
      add(rescale, sums);
      if (part % 2 == 0) continue;
      sync_warp();  // all lanes have read the scales of the tile's tokens
      release_stage<Traits, Side::kValues>(ring);
      ring.advance();
    }
  }

  // All halves before this one have been added.
  QUIRE_DEVICE void take(int part, const RowStats (&stats)[2]) {
    finish_chunks(part / kPartsPerChunk);
    QUIRE_UNROLL
    for (int h = 0; h < 2; ++h) state.chunk[h] = stats[h];
  }
};

// Rows [first_row, first_row + kRows) of the item.
template <class Traits>
QUIRE_DEVICE void consume_codes(const AttentionArgs& args, const ItemQueue<Traits>& items,
                                int first_row, Ring<Traits>& ring) {
  const Item item = load_item(args, items.current());
  const AttentionParams& p = args.params;
  const int warp_row = thread_index() / kWarpSize * kTile;
  const int last_row = min(item.num_rows, first_row + Traits::kRows) - 1;
  const PrefillTiles<Traits> tiles(keys_to_read(p, item, first_row, last_row));
  const float factor = mul(Traits::kMode == Mode::kFast ? p.scale * kLog2E : 1.0f,
                           item_scale(p.k_scale, item.kv_head));
  CodeConsumer<Traits> consumer{args, items, first_row, factor, item.kv_begin / kKvChunk,
                                {},   {},    {}};
  PrefillState<Traits>& state = consumer.state;
  consumer.queries.load(args, item, first_row + warp_row);
  store_masked_rows<Traits>(p, item, first_row + warp_row, last_row);
  if constexpr (Traits::kMode == Mode::kFull)
    consumer.attend_in_order(2 * tiles.begin, 2 * tiles.end, ring);
  else
    consumer.attend(2 * tiles.begin, 2 * tiles.end, ring);
  const Item same = load_item(args, items.current());  // so that it is not kept so long
  consumer.finish_chunks(max(same.kv_begin / kKvChunk + 1, ceil_div(same.kv_end, kKvChunk)));
  if (same.partial < 0) write_total<Traits>(args, same, state, first_row);
}

template <class Traits>
QUIRE_DEVICE void prefill_e4m3_sm90(const BoxedAttentionArgs& args) {
  if (thread_index() == 0) {
    Ring<Traits> ring;
    for (; ring.stage < Traits::kStages; ++ring.stage)
      mbarrier_init(ring.template barrier<Side::kValues, Handover::kLanded>(), 4);
  }
  init_barriers<Traits>();
  if (thread_index() >= Traits::kConsumerThreads) {
    decrease_registers<Traits::kProducerRegisters>();
    produce<Traits, TurningProducer<Traits>>(args);
  } else {
    increase_registers<Traits::kConsumerRegisters>();
    consume<Traits, consume_codes<Traits>>(args.attention);
  }
}

}  // namespace quire::device
