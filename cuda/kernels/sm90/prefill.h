// SPDX-License-Identifier: Apache-2.0
// prefill of compute capability 9.0a: the last warpgroup brings tiles of keys and values to the
// stages of a ring, the others multiply: 64 rows each, by products of warpgroups.
//
// A stage of K or of V is handed over by two mbarriers. `full`: each warp of the producer arrives
// when its rows of the tile have landed; `empty`: each warp of the consumers when its products have
// read them. Bits of a row come about as in kernels/prefill.h: by chunks of kKvChunk keys, folded
// into `total`.
#pragma once

#include "kernels/prefill.h"
#include "prim/sm90.h"

namespace quire::device {

enum class Side { kKeys, kValues };
enum class Handover { kFull, kEmpty };

// Number and parity of the stage that is next.
template <class Traits>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  QUIRE_DEVICE void advance() {
    if (++stage < Traits::kStages) return;
    stage = 0;
    parity ^= 1;
  }
  template <Side kSide>
  QUIRE_DEVICE SharedAddress tile() const {
    return shared_base() +
           static_cast<uint32_t>(Traits::kStageOffset +
                                 (2 * stage + static_cast<int>(kSide)) * Traits::kKeyTileBytes);
  }
  template <Side kSide, Handover kHandover>
  QUIRE_DEVICE SharedAddress barrier() const {
    constexpr int kIndex = 2 * static_cast<int>(kSide) + static_cast<int>(kHandover);
    return shared_base() +
           static_cast<uint32_t>(Traits::kBarrierOffset + (kIndex * Traits::kStages + stage) * 8);
  }
};

// Bytes from the begin of a tile of `rows` rows to a piece of one of them.
QUIRE_DEVICE uint32_t column_piece_offset(int rows, int row, int piece) {
  return static_cast<uint32_t>((piece / 8 * rows + row) * 128 + ((piece ^ row) & 7) * 16);
}

// --- Producer
// --------------------------------------------------------------------------------------

// K or V of one sequence and kv head, by strides in elements.
struct RowSource {
  const uint16_t* rows;
  int64_t stride_block, stride_row;
  int dim;

  template <Side kSide>
  static QUIRE_DEVICE RowSource of(const AttentionParams& p, const Item& item) {
    const bool is_k = kSide == Side::kKeys;
    const int64_t stride_seq = is_k ? p.k_stride_seq : p.v_stride_seq;
    const int64_t stride_head = is_k ? p.k_stride_head : p.v_stride_head;
    return {static_cast<const uint16_t*>(is_k ? p.k : p.v) + item.sequence_index * stride_seq +
                item.kv_head * stride_head,
            is_k ? p.k_stride_block : p.v_stride_block, is_k ? p.k_stride_row : p.v_stride_row,
            is_k ? p.head_dim : p.head_dim_v};
  }
};

// One warp of the producer: it brings a quarter of each tile's rows.
template <class Traits>
struct Producer {
  const BoxedAttentionArgs& args;
  Ring<Traits> ring;
  SharedAddress unpublished{0};  // `full` of what has been gathered last; 0: none

  // What has been gathered has landed but for the latest kGroups: tells the consumers.
  template <int kGroups>
  QUIRE_DEVICE void publish() {
    if (unpublished.value == 0) return;
    cp_async_wait<kGroups>();
    fence_proxy_async();
    sync_warp();
    if (thread_index() % kWarpSize == 0) mbarrier_arrive(unpublished);
    unpublished = {0};
  }

  // By boxes, each sent by the lane of its first row. `at`: the lane's row.
  template <Side kSide>
  QUIRE_DEVICE void copy_rows(const Item& item, Location at, int first_row) {
    const AttentionParams& p = args.attention.params;
    const int lane = thread_index() % kWarpSize;
    const SharedAddress full = ring.template barrier<kSide, Handover::kFull>();
    if (lane == 0) mbarrier_arrive_expect(full, Traits::kWarpKeys * Traits::kHeadDim * 2);
    if (lane >= Traits::kWarpKeys || lane % args.box_rows != 0) return;
    const int64_t stride_seq = kSide == Side::kKeys ? p.k_stride_seq : p.v_stride_seq;
    const int outer = p.block_table ? at.block : stride_seq != 0 ? item.sequence_index : 0;
    const TensorMap* map = kSide == Side::kKeys ? &args.k : &args.v;
    QUIRE_UNROLL
    for (int column = 0; column < Traits::kHeadDim; column += 64)
      copy_box(
          ring.template tile<kSide>() +
              static_cast<uint32_t>(column / 64 * Traits::kColumnBytes + (first_row + lane) * 128),
          map, full, column, at.row, item.kv_head, outer);
  }

  // Piece by piece: rows of the tile that are keys in `keys`, zeros for the others.
  template <Side kSide>
  QUIRE_DEVICE void gather_rows(const Item& item, Location at, int first_row, KeyRange keys,
                                int first_key) {
    constexpr int kPieces = Traits::kHeadDim / kPiece;
    const auto source = RowSource::of<kSide>(args.attention.params, item);
    const int lane = fresh_thread_index() % kWarpSize;
    for (int i = lane; i < Traits::kWarpKeys * kPieces; i += kWarpSize) {
      const int row = i / kPieces, piece = i % kPieces;
      const int64_t block = shuffle(at.block, row), block_row = shuffle(at.row, row);
      const int key = first_key + row;
      const bool exists = key >= keys.begin && key < keys.end;
      load_piece<Traits::kMode>(
          ring.template tile<kSide>() + column_piece_offset(Traits::kKeys, first_row + row, piece),
          source.rows + block * source.stride_block + block_row * source.stride_row +
              piece * kPiece,
          exists ? source.dim - piece * kPiece : 0, args.attention.is_aligned);
    }
    cp_async_commit();
    publish<1>();
    unpublished = ring.template barrier<kSide, Handover::kFull>();
  }

  template <Side kSide>
  QUIRE_DEVICE void load(const Item& item, Location at, bool by_boxes, int first_row, KeyRange keys,
                         int first_key) {
    mbarrier_wait(ring.template barrier<kSide, Handover::kEmpty>(), ring.parity ^ 1);
    if (by_boxes) {
      publish<0>();
      copy_rows<kSide>(item, at, first_row);
    } else {
      gather_rows<kSide>(item, at, first_row, keys, first_key);
    }
  }

  // Keys that queries of the tile see go by boxes where whole boxes of the sequence do; the rest
  // is not to be read, as it may be anything.
  QUIRE_DEVICE void load_tile(const Item& item, KeyRange keys, int tile) {
    const AttentionParams& p = args.attention.params;
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize % 4;
    const int first_row = warp * Traits::kWarpKeys;
    const int first_key = tile * Traits::kKeys + first_row;
    const bool by_boxes = args.box_rows > 0 && first_key >= keys.begin &&
                          first_key + Traits::kWarpKeys <= item.sequence.seq_len;
    const KeyRange located{keys.begin, by_boxes ? item.sequence.seq_len : keys.end};
    const Location at = locate(p, item, located, first_key + lane % Traits::kWarpKeys);
    load<Side::kKeys>(item, at, by_boxes, first_row, keys, first_key);
    load<Side::kValues>(item, at, by_boxes, first_row, keys, first_key);
    ring.advance();
  }
};

template <class Traits>
QUIRE_DEVICE void produce(const BoxedAttentionArgs& args) {
  Producer<Traits> producer{args, {}};
  for (int i = first_item(args.attention) + block_index(); i < end_of_items(args.attention);
       i += num_blocks()) {
    const Item item = load_item(args.attention, i);
    for (int row = 0; row < item.num_rows; row += Traits::kRows) {
      const int last_row = min(item.num_rows, row + Traits::kRows) - 1;
      const PrefillTiles<Traits> tiles(keys_to_read(args.attention.params, item, row, last_row));
      for (int tile = tiles.begin; tile < tiles.end; ++tile)
        producer.load_tile(item, tiles.keys, tile);
    }
  }
  producer.template publish<0>();
}

// --- Consumers
// -------------------------------------------------------------------------------------

template <class Traits>
QUIRE_DEVICE void sync_consumers(Site site = Site::here()) {
  sync_threads<1, Traits::kConsumerThreads>(site);
}

// Query rows [first_row, first_row + kRows); rows and columns that do not exist are zero.
template <class Traits>
QUIRE_DEVICE void load_query_columns(const AttentionArgs& args, const Item& item, int first_row) {
  constexpr int kPieces = Traits::kHeadDim / kPiece;
  const AttentionParams& p = args.params;
  const auto* q = static_cast<const uint16_t*>(p.q) + item.sequence_index * p.q_stride_seq;
  sync_consumers<Traits>();  // before the queries in use are overwritten
  for (int i = thread_index(); i < Traits::kRows * kPieces; i += Traits::kConsumerThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool exists = first_row + row < item.num_rows;
    const int source = exists ? first_row + row : 0;
    const int64_t offset = item.batch_row(source) * p.q_stride_row +
                           item.head(source) * p.q_stride_head + piece * kPiece;
    load_piece<Traits::kMode>(
        shared_base() + Traits::kQueryOffset + column_piece_offset(Traits::kRows, row, piece),
        q + offset, exists ? p.head_dim - piece * kPiece : 0, args.is_aligned);
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
  sync_consumers<Traits>();
}

// The products of this warp that read the stage are done.
template <class Traits, Side kSide>
QUIRE_DEVICE void release_stage(const Ring<Traits>& ring) {
  if (thread_index() % kWarpSize == 0)
    mbarrier_arrive(ring.template barrier<kSide, Handover::kEmpty>());
}

// scores[64 queries][kKeys] = queries x keys of the stage.
template <class Traits>
QUIRE_DEVICE void multiply_stage_keys(float (&scores)[Traits::kKeys / 8][4],
                                      const Ring<Traits>& ring) {
  const SharedAddress queries =
      shared_base() + Traits::kQueryOffset + static_cast<uint32_t>(thread_index() / 128 * 64 * 128);
  const SharedAddress keys = ring.template tile<Side::kKeys>();
  mbarrier_wait(ring.template barrier<Side::kKeys, Handover::kFull>(), ring.parity);
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
  release_stage<Traits, Side::kKeys>(ring);
}

// sums[64 queries][kHeadDim] += weights x values of the stage.
template <class Traits>
QUIRE_DEVICE void multiply_stage_values(float (&sums)[Traits::kHeadDim / 8][4],
                                        const float (&weights)[Traits::kKeys / 8][4],
                                        const Ring<Traits>& ring) {
  using Type = typename Traits::Type;
  uint32_t rounded[Traits::kKeys / kTile][4];
  QUIRE_UNROLL
  for (int n = 0; n < Traits::kKeys / 8; ++n) {
    rounded[n / 2][n % 2 * 2] = pack<Type>(weights[n][0], weights[n][1]);
    rounded[n / 2][n % 2 * 2 + 1] = pack<Type>(weights[n][2], weights[n][3]);
  }
  const SharedAddress values = ring.template tile<Side::kValues>();
  mbarrier_wait(ring.template barrier<Side::kValues, Handover::kFull>(), ring.parity);
  wgmma_fence();
  QUIRE_UNROLL
  for (int step = 0; step < Traits::kKeys / kTile; ++step)
    wgmma<Type, Major::kN>(sums, rounded[step],
                           describe_matrix(values + static_cast<uint32_t>(step * kTile * 128),
                                           Traits::kColumnBytes, 1024),
                           true);
  wgmma_commit();
  wgmma_wait<0>();
  release_stage<Traits, Side::kValues>(ring);
}

// Rows [first_row, first_row + kRows) of an item.
template <class Traits>
QUIRE_DEVICE void consume_rows(const AttentionArgs& args, const Item& item, int first_row,
                               Ring<Traits>& ring) {
  const AttentionParams& p = args.params;
  const int lane = thread_index() % kWarpSize, warp_row = thread_index() / kWarpSize * kTile;
  const int last_row = min(item.num_rows, first_row + Traits::kRows) - 1;
  const PrefillTiles<Traits> tiles(keys_to_read(p, item, first_row, last_row));
  const float factor = Traits::kMode == Mode::kFast ? p.scale * kLog2E : 1.0f;
  load_query_columns<Traits>(args, item, first_row);
  PrefillState<Traits> state;
  QUIRE_UNROLL
  for (int h = 0; h < 2; ++h)
    state.rows[h] = make_score_row(p, item, min(first_row + warp_row + lane / 4 + 8 * h, last_row));

  // Every chunk of the item is finished, as in kernels/prefill.h.
  constexpr int kTilesPerChunk = kKvChunk / Traits::kKeys;
  const int first_chunk = item.kv_begin / kKvChunk;
  const int end_chunk = max(first_chunk + 1, ceil_div(item.kv_end, kKvChunk));
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    const int begin = max(tiles.begin, chunk * kTilesPerChunk);
    const int end = min(tiles.end, (chunk + 1) * kTilesPerChunk);
    for (int tile = begin; tile < end; ++tile) {
      float scores[Traits::kKeys / 8][4];
      multiply_stage_keys<Traits>(scores, ring);
      mask_scores<Traits::kMode, Traits::kKeys>(p, state.rows, tile * Traits::kKeys, scores);
      add_to_softmax<Traits>(factor, TokenScales{}, state.chunk, scores, state.sums);
      multiply_stage_values<Traits>(state.sums, scores, ring);
      ring.advance();
    }
    finish_chunk<Traits>(args, item, state, factor, chunk, chunk == first_chunk, first_row);
  }
  if (item.partial < 0) write_total<Traits>(args, item, state, first_row);
}

// To the merge, the consumers are all threads there are.
template <class Traits>
struct ConsumerTraits : Traits {
  static constexpr int kThreads = Traits::kConsumerThreads;
};

// merge_if_last() of kernels/state.h, by the consumers alone.
template <class Traits>
QUIRE_DEVICE void merge_if_last_consumers(const AttentionArgs& args, const Item& item) {
  const SharedAddress flag = shared_base() + Traits::kFlagOffset;
  fence_gpu();
  sync_consumers<Traits>();
  if (thread_index() == 0) {
    const auto last = static_cast<uint32_t>(ld_global(&args.merges[item.merge].num_items) - 1);
    st_shared<uint32_t>(flag, atomic_increment(args.counters + item.merge, last) == last);
  }
  sync_consumers<Traits>();
  if (!ld_shared<uint32_t>(flag)) return;
  fence_gpu();
  merge<ConsumerTraits<Traits>>(args, item);
}

template <class Traits>
QUIRE_DEVICE void consume(const AttentionArgs& args) {
  Ring<Traits> ring;
  for (int i = first_item(args) + block_index(); i < end_of_items(args); i += num_blocks()) {
    const Item item = load_item(args, i);
    for (int row = 0; row < item.num_rows; row += Traits::kRows)
      consume_rows<Traits>(args, item, row, ring);
    if (item.merge >= 0) merge_if_last_consumers<Traits>(args, item);
  }
}

template <class Traits>
QUIRE_DEVICE void init_ring() {
  if (thread_index() == 0) {
    Ring<Traits> ring;
    for (ring.stage = 0; ring.stage < Traits::kStages; ++ring.stage) {
      mbarrier_init(ring.template barrier<Side::kKeys, Handover::kFull>(), 4);
      mbarrier_init(ring.template barrier<Side::kValues, Handover::kFull>(), 4);
      mbarrier_init(ring.template barrier<Side::kKeys, Handover::kEmpty>(), 4 * Traits::kConsumers);
      mbarrier_init(ring.template barrier<Side::kValues, Handover::kEmpty>(),
                    4 * Traits::kConsumers);
    }
    fence_mbarrier_init();
  }
  sync_block();
}

template <class Traits>
QUIRE_DEVICE void prefill_sm90(const BoxedAttentionArgs& args) {
  init_ring<Traits>();
  if (thread_index() >= Traits::kConsumerThreads) {
    decrease_registers<Traits::kProducerRegisters>();
    produce<Traits>(args);
  } else {
    increase_registers<Traits::kConsumerRegisters>();
    consume<Traits>(args.attention);
  }
}

}  // namespace quire::device
