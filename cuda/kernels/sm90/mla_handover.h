// SPDX-License-Identifier: Apache-2.0
// What the warpgroups of sm90/mla_decode.h hand to each other: units of work, tiles of keys,
// weights, and how chunks are to be folded. Each goes through slots with two mbarriers: `full`,
// where those who fill it arrive, a lane of each warp, and `empty`, where those who read it do.
#pragma once

#include "kernels/sm90/producer.h"

namespace quire::device {

// Named barriers.
inline constexpr int kSumBarrier = 1;
inline constexpr int kScoreBarrier = 2;

// Rows [first_row, first_row + kRows) of an item, if it has them. Units that follow each other are
// the tiles of rows of one item, so that its keys come from memory once and then from L2. The tiles
// are merged on their own, too.
struct MlaUnit {
  int index;  // of the item
  int tile, num_tiles;
  int first_row;
};

template <class Traits>
QUIRE_DEVICE int num_units(const AttentionArgs& args) {
  return (end_of_items(args) - first_item(args)) * ceil_div(args.item_rows, Traits::kRows);
}
template <class Traits>
QUIRE_DEVICE MlaUnit unit_at(const AttentionArgs& args, int number) {
  const int tiles = ceil_div(args.item_rows, Traits::kRows), tile = number % tiles;
  return {first_item(args) + number / tiles, tile, tiles, tile * Traits::kRows};
}

// Slots in turn.
template <int kOffset, int kSlots>
struct Slots {
  uint32_t turn = 0;

  QUIRE_DEVICE uint32_t slot() const { return turn % kSlots; }
  template <Handover kHandover>
  QUIRE_DEVICE SharedAddress barrier() const {
    return shared_base() + (kOffset + static_cast<int>(kHandover) * kSlots * 8 + slot() * 8);
  }
  template <Handover kHandover>
  QUIRE_DEVICE void wait() const {
    const uint32_t parity = turn / kSlots & 1;
    mbarrier_wait(barrier<kHandover>(), kHandover == Handover::kFull ? parity : parity ^ 1);
  }
  // What the warp has stored or read is stored or read.
  template <Handover kHandover>
  QUIRE_DEVICE void pass() const {
    sync_warp();
    if (thread_index() % kWarpSize == 0) mbarrier_arrive(barrier<kHandover>());
  }
  template <Handover kHandover>
  QUIRE_DEVICE static void init(int warps) {
    Slots slots;
    for (; slots.turn < kSlots; ++slots.turn)
      mbarrier_init(slots.template barrier<kHandover>(), warps);
  }
};

// Of tiles of weights, of two in turn, and what sums are to be multiplied with before they are
// added.
template <class Traits>
struct WeightSlots : Slots<Traits::kWeightBarrierOffset, 2> {
  // The left half of the rows or the right one.
  QUIRE_DEVICE SharedAddress piece(int row, int piece) const {
    return shared_base() +
           (Traits::kWeightOffset +
            column_piece_offset(Traits::kRows, row,
                                static_cast<int>(this->slot()) * (Traits::kKeys / kPiece) + piece));
  }
  QUIRE_DEVICE SharedAddress operand(int step) const {
    return shared_base() + (Traits::kWeightOffset + this->slot() * (Traits::kKeys * 2) +
                            static_cast<uint32_t>(step * kTile * 2));
  }
  QUIRE_DEVICE SharedAddress rescale(int row) const {
    return shared_base() + (Traits::kRescaleOffset + this->slot() * (Traits::kRows * 4) +
                            static_cast<uint32_t>(row * 4));
  }
};

// Of the end of a chunk: for each row FoldScales, and the stats of all chunks so far.
template <class Traits>
struct FoldSlot : Slots<Traits::kFoldBarrierOffset, 1> {
  QUIRE_DEVICE SharedAddress row(int row) const {
    return shared_base() + static_cast<uint32_t>(Traits::kFoldOffset + row * 16);
  }
};

// What a tile of keys, and then the chunk that it ends, goes through.
template <class Traits>
struct MlaTurns {
  Ring<Traits> ring;
  WeightSlots<Traits> weights;
  FoldSlot<Traits> folds;

  QUIRE_DEVICE SharedAddress keys() const { return ring.template tile<Side::kKeys>(); }
  QUIRE_DEVICE void wait_keys() const {
    mbarrier_wait(ring.template barrier<Side::kKeys, Handover::kFull>(), ring.parity);
  }
  // The products of this warp that read the tile are done.
  QUIRE_DEVICE void release_keys() const {
    if (thread_index() % kWarpSize == 0)
      mbarrier_arrive(ring.template barrier<Side::kKeys, Handover::kEmpty>());
  }
  QUIRE_DEVICE void advance() {
    ring.advance();
    ++weights.turn;
  }
};

// Calls of_tile(tile) for each tile of keys that the unit's rows see, and after those of a chunk
// of_chunk(item, slot): the slot of its partial result or -1. Every chunk of the item has its turn,
// also one that these rows do not see: whoever merges expects all of them. Between chunks no
// register holds the item.
template <class Traits, class OfTile, class OfChunk>
QUIRE_DEVICE void for_each_chunk(const AttentionArgs& args, const MlaUnit& unit, OfTile of_tile,
                                 OfChunk of_chunk) {
  const Item item = load_item(args, unit.index);
  const int last_row = min(item.num_rows, unit.first_row + Traits::kRows) - 1;
  const PrefillTiles<Traits> tiles(keys_to_read(args.params, item, unit.first_row, last_row));
  int tile = tiles.begin, chunk = item.kv_begin / kKvChunk;
  const int end_tile = tiles.end;
  bool is_last;
  do {
    const int end = min(end_tile, (chunk + 1) * (kKvChunk / Traits::kKeys));
    for (; tile < end; ++tile) of_tile(tile);
    const Item again = load_item(args, unit.index);
    const int place = chunk - again.kv_begin / kKvChunk;
    is_last = ++chunk * kKvChunk >= again.kv_end;
    of_chunk(again, again.partial < 0 ? -1 : again.partial + place, place == 0, is_last);
  } while (!is_last);
}

// Of the block's rows, the first of this thread's: of those of a warpgroup.
QUIRE_DEVICE int own_row() {
  const int thread = fresh_thread_index();
  return thread / kWarpSize % 4 * kTile + thread % kWarpSize / 4;
}

// --- The producer --------------------------------------------------------------------------------

// One of its warps: of a tile it brings every fourth 64 columns by boxes, or eight keys piece by
// piece.
template <class Traits>
struct MlaProducer : Producer<Traits> {
  static constexpr int kWarps = 4;

  QUIRE_DEVICE SharedAddress full() const {
    return this->ring.template barrier<Side::kKeys, Handover::kFull>();
  }

  // `at`: of the lane's key.
  QUIRE_DEVICE void copy_columns(const Item& item, Location at) {
    constexpr int kColumns = Traits::kHeadDim / 64;
    const BoxedAttentionArgs& args = this->args;
    const AttentionParams& p = args.attention.params;
    const int thread = fresh_thread_index();
    const int lane = thread % kWarpSize, warp = thread / kWarpSize % kWarps;
    if (lane == 0)
      mbarrier_arrive_expect(full(),
                             (kColumns - warp + kWarps - 1) / kWarps * Traits::kColumnBytes);
    if (lane % args.box_rows != 0) return;
    const int outer = p.block_table ? at.block : p.k_stride_seq != 0 ? item.sequence_index : 0;
    for (int column = warp; column < kColumns; column += kWarps)
      copy_box(this->ring.template tile<Side::kKeys>() +
                   static_cast<uint32_t>(column * Traits::kColumnBytes + lane * 128),
               &args.k, full(), 64 * column, at.row, item.kv_head, outer);
  }

  // Zeros for keys that do not `exist`.
  QUIRE_DEVICE void gather_keys(const Item& item, Location at, bool exists) {
    constexpr int kPieces = Traits::kHeadDim / kPiece, kWarpRows = Traits::kKeys / kWarps;
    constexpr int64_t kAbsent = -1;
    const AttentionParams& p = this->args.attention.params;
    const auto* k = static_cast<const uint16_t*>(p.k);
    const int thread = fresh_thread_index();
    const int first_row = thread / kWarpSize % kWarps * kWarpRows;
    const int64_t own = item.sequence_index * p.k_stride_seq + item.kv_head * p.k_stride_head +
                        at.block * p.k_stride_block + at.row * p.k_stride_row;
    QUIRE_UNROLL_BY(2)
    for (int i = thread % kWarpSize; i < kWarpRows * kPieces; i += kWarpSize) {
      const int row = first_row + i / kPieces, piece = i % kPieces;
      const int64_t begin = shuffle(exists ? own : kAbsent, row);
      load_piece<Traits::kMode>(
          this->ring.template tile<Side::kKeys>() + column_piece_offset(Traits::kKeys, row, piece),
          begin == kAbsent ? k : k + begin + piece * kPiece,
          begin == kAbsent ? 0 : p.head_dim - piece * kPiece, this->args.attention.is_aligned);
    }
    cp_async_commit();
    this->template publish<1>();
    this->unpublished = full();
  }

  QUIRE_DEVICE MlaUnit unit() const {
    return unit_at<Traits>(this->args.attention, this->items.current());
  }

  // Keys that the rows see go by boxes where a whole tile of the sequence does; what is beyond is
  // not to be read, as it may be anything.
  QUIRE_DEVICE void load(int tile) {
    const MlaUnit unit = this->unit();  // each time anew: else it is registers
    const AttentionArgs& args = this->args.attention;
    const Item item = load_item(args, unit.index);
    const KeyRange keys = this->keys_of(item, unit.first_row);
    const int first_key = tile * Traits::kKeys;
    const int key = first_key + fresh_thread_index() % kWarpSize;
    const bool by_boxes = this->args.box_rows > 0 && first_key >= keys.begin &&
                          first_key + Traits::kKeys <= item.sequence.seq_len;
    const KeyRange located{keys.begin, by_boxes ? item.sequence.seq_len : keys.end};
    const Location at = locate(args.params, item, located, key);
    mbarrier_wait(this->ring.template barrier<Side::kKeys, Handover::kEmpty>(),
                  this->ring.parity ^ 1);
    if (by_boxes) {
      this->template publish<0>();
      copy_columns(item, at);
    } else {
      gather_keys(item, at, key >= keys.begin && key < keys.end);
    }
  }

  QUIRE_DEVICE void load_unit() {
    const MlaUnit unit = this->unit();
    const Item item = load_item(this->args.attention, unit.index);
    const PrefillTiles<Traits> tiles(
        unit.first_row < item.num_rows ? this->keys_of(item, unit.first_row) : KeyRange{0, 0});
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      load(tile);
      this->ring.advance();
    }
    // Else units without keys could fill the queue while consumers wait for what is unpublished.
    if (tiles.begin == tiles.end) this->template publish<0>();
  }
};

// As produce() of sm90/producer.h, of units.
template <class Traits>
QUIRE_DEVICE void produce_units(const BoxedAttentionArgs& args) {
  MlaProducer<Traits> producer{{args}};
  ItemQueue<Traits>& items = producer.items;
  const auto unit_or_none = [&args](int number) {
    return number < num_units<Traits>(args.attention) ? number : kNoItem;
  };
  const bool deals = thread_index() == Traits::kConsumerThreads;
  if (deals) items.put(unit_or_none(block_index()));
  while (items.wait() != kNoItem) {
    if (deals) {
      const auto last = static_cast<uint32_t>(num_units<Traits>(args.attention) - 1);
      const uint32_t ticket = take_ticket(args.attention.tickets, last);
      ItemQueue<Traits>{items.turn + 1}.put(unit_or_none(num_blocks() + static_cast<int>(ticket)));
    }
    sync_warp();
    producer.load_unit();
    items.advance();
  }
  producer.template publish<0>();
}

}  // namespace quire::device
