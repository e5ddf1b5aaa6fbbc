// SPDX-License-Identifier: Apache-2.0
// The producer of sm90/prefill.h: one warpgroup that brings tiles of keys and values to the stages
// of a ring, by boxes or piece by piece. It gives most of its registers to the consumers, so what
// it keeps through a loop is little.
//
// A stage of K or of V is handed over by two mbarriers. `full`: each warp of the producer arrives
// when its rows of the tile have landed; `empty`: each warp of the consumers when its products have
// read them. Codes of values, which the producer turns before they are full, have a third:
// `landed`.
#pragma once

#include "kernels/prefill.h"
#include "prim/sm90.h"

namespace quire::device {

enum class Side { kKeys, kValues };
enum class Handover { kFull, kEmpty, kLanded };

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
  QUIRE_DEVICE Ring previous() const {
    return stage > 0 ? Ring{stage - 1, parity} : Ring{Traits::kStages - 1, parity ^ 1};
  }
  template <Side kSide>
  QUIRE_DEVICE SharedAddress tile() const {
    return shared_base() +
           static_cast<uint32_t>(Traits::kStageOffset + stage * Traits::kStageBytes +
                                 (kSide == Side::kKeys ? 0 : Traits::kKeyTileBytes));
  }
  template <Side kSide, Handover kHandover>
  QUIRE_DEVICE SharedAddress barrier() const {
    constexpr int kIndex = 2 * static_cast<int>(kSide) + static_cast<int>(kHandover);
    return shared_base() +
           static_cast<uint32_t>(Traits::kBarrierOffset + (kIndex * Traits::kStages + stage) * 8);
  }
};

inline constexpr int kNoItem = -1;

// Which item is next, or kNoItem. The first of a block is that of its index; further ones are dealt
// out to whichever block asks, in the order of the list. Numbers go around in slots, handed over
// like stages: put there by one thread, and done with when every warp is.
template <class Traits>
struct ItemQueue {
  uint32_t turn = 0;  // of slot turn % kItemSlots

  template <Handover kHandover>
  QUIRE_DEVICE SharedAddress barrier() const {
    return slot(static_cast<int>(kHandover) * Traits::kItemSlots * 8, 8);
  }
  QUIRE_DEVICE SharedAddress number() const { return slot(2 * Traits::kItemSlots * 8, 4); }
  QUIRE_DEVICE uint32_t parity() const { return turn / Traits::kItemSlots & 1; }

  QUIRE_DEVICE void put(int item) const {
    mbarrier_wait(barrier<Handover::kEmpty>(), parity() ^ 1);
    st_shared<uint32_t>(number(), static_cast<uint32_t>(item));
    mbarrier_arrive(barrier<Handover::kFull>());
  }
  QUIRE_DEVICE int wait() const {
    mbarrier_wait(barrier<Handover::kFull>(), parity());
    return current();
  }
  // Until advance(). To ask again is cheaper than to keep it in a register.
  QUIRE_DEVICE int current() const { return static_cast<int>(ld_shared<uint32_t>(number())); }
  QUIRE_DEVICE void advance() {
    sync_warp();
    if (thread_index() % kWarpSize == 0) mbarrier_arrive(barrier<Handover::kEmpty>());
    ++turn;
  }

 private:
  QUIRE_DEVICE SharedAddress slot(int offset, uint32_t bytes) const {
    return shared_base() + (static_cast<uint32_t>(Traits::kItemOffset + offset) +
                            turn % Traits::kItemSlots * bytes);
  }
};

// Bytes from the begin of a tile of `rows` rows to a piece of one of them.
QUIRE_DEVICE uint32_t column_piece_offset(int rows, int row, int piece) {
  return static_cast<uint32_t>((piece / 8 * rows + row) * 128 + ((piece ^ row) & 7) * 16);
}

// --- Producer ------------------------------------------------------------------------------------

// One warp of the producer: it brings a quarter of each tile's rows.
template <class Traits>
struct Producer {
  using Bits = typename Traits::KvType::Bits;
  template <Side kSide>
  static constexpr int kRowBytes =
      (kSide == Side::kKeys ? Traits::kKeyDim : Traits::kHeadDim) * sizeof(Bits);
  // Boxes that make a row, of 128 bytes each.
  template <Side kSide>
  static constexpr int kBoxes = (kRowBytes<kSide> + 127) / 128;
  // What is told of rows that are in shared memory.
  template <Side kSide>
  static constexpr Handover kArrival =
      Traits::kIsQuantised && kSide == Side::kValues ? Handover::kLanded : Handover::kFull;

  const BoxedAttentionArgs& args;
  Ring<Traits> ring = {};
  ItemQueue<Traits> items = {};
  SharedAddress unpublished{0};  // the barrier of what has been gathered last; 0: none

  QUIRE_DEVICE KeyRange keys_of(const Item& item, int row) const {
    return keys_to_read(args.attention.params, item, row,
                        min(item.num_rows, row + Traits::kRows) - 1);
  }

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
    const SharedAddress arrival = ring.template barrier<kSide, kArrival<kSide>>();
    if (lane == 0) mbarrier_arrive_expect(arrival, Traits::kWarpKeys * kBoxes<kSide> * 128);
    if (lane >= Traits::kWarpKeys || lane % args.box_rows != 0) return;
    const int64_t stride_seq = kSide == Side::kKeys ? p.k_stride_seq : p.v_stride_seq;
    const int outer = p.block_table ? at.block : stride_seq != 0 ? item.sequence_index : 0;
    const TensorMap* map = kSide == Side::kKeys ? &args.k : &args.v;
    QUIRE_UNROLL
    for (int column = 0; column < kBoxes<kSide>; ++column)
      copy_box(ring.template tile<kSide>() +
                   static_cast<uint32_t>(column * Traits::kColumnBytes + (first_row + lane) * 128),
               map, arrival, 64 * column, at.row, item.kv_head, outer);
  }

  // Piece by piece, zeros for rows that do not `exist`.
  template <Side kSide>
  QUIRE_DEVICE void gather_rows(const Item& item, Location at, int first_row, bool exists) {
    constexpr int kPieces = kRowBytes<kSide> / kPieceBytes;
    constexpr int kElements = kPieceBytes / sizeof(Bits);  // of a piece
    constexpr int64_t kAbsent = -1;
    constexpr bool kIsK = kSide == Side::kKeys;
    const AttentionParams& p = args.attention.params;
    const auto* tensor = static_cast<const Bits*>(kIsK ? p.k : p.v);
    const int lane = fresh_thread_index() % kWarpSize;
    // Where the lane's row begins in `tensor`: to be told to the lanes that bring its pieces.
    const int64_t own = item.sequence_index * (kIsK ? p.k_stride_seq : p.v_stride_seq) +
                        item.kv_head * (kIsK ? p.k_stride_head : p.v_stride_head) +
                        at.block * (kIsK ? p.k_stride_block : p.v_stride_block) +
                        at.row * (kIsK ? p.k_stride_row : p.v_stride_row);
    QUIRE_UNROLL_BY(2)
    for (int i = lane; i < Traits::kWarpKeys * kPieces; i += kWarpSize) {
      const int row = i / kPieces, piece = i % kPieces;
      const int64_t begin = shuffle(exists ? own : kAbsent, row);
      const int columns = (kIsK ? p.head_dim : p.head_dim_v) - piece * kElements;
      load_piece<Traits::kMode>(
          ring.template tile<kSide>() + column_piece_offset(Traits::kKeys, first_row + row, piece),
          begin == kAbsent ? tensor : tensor + begin + piece * kElements,
          begin == kAbsent ? 0 : columns, args.attention.is_aligned);
    }
    cp_async_commit();
    publish<1>();
    unpublished = ring.template barrier<kSide, kArrival<kSide>>();
  }

  QUIRE_DEVICE Item item() const { return load_item(args.attention, items.current()); }

  // K or V of a tile, for rows `row` to row + kRows of the item. Keys that these see go by
  // boxes where whole boxes of the sequence do; the rest is not to be read, as it may be anything.
  template <Side kSide>
  QUIRE_DEVICE void load(int row, int tile) {
    const Item item = this->item();  // each time anew: else it is registers
    const KeyRange keys = keys_of(item, row);
    const int thread = fresh_thread_index();
    const int first_row = thread / kWarpSize % 4 * Traits::kWarpKeys;
    const int first_key = tile * Traits::kKeys + first_row;
    const int key = first_key + thread % kWarpSize % Traits::kWarpKeys;
    const bool by_boxes = args.box_rows > 0 && first_key >= keys.begin &&
                          first_key + Traits::kWarpKeys <= item.sequence.seq_len;
    const KeyRange located{keys.begin, by_boxes ? item.sequence.seq_len : keys.end};
    const Location at = locate(args.attention.params, item, located, key);
    mbarrier_wait(ring.template barrier<kSide, Handover::kEmpty>(), ring.parity ^ 1);
    if (by_boxes) {
      publish<0>();
      copy_rows<kSide>(item, at, first_row);
    } else {
      gather_rows<kSide>(item, at, first_row, key >= keys.begin && key < keys.end);
    }
  }

  QUIRE_DEVICE void load_tiles(int row, const PrefillTiles<Traits>& tiles) {
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      load<Side::kKeys>(row, tile);
      load<Side::kValues>(row, tile);
      ring.advance();
    }
    // Else items without keys could fill the queue while consumers wait for what is unpublished.
    if (tiles.begin == tiles.end) publish<0>();
  }
};

template <class Traits, class Producer = Producer<Traits>>
QUIRE_DEVICE void produce(const BoxedAttentionArgs& args) {
  Producer producer{args};
  ItemQueue<Traits>& items = producer.items;
  const auto item_at = [&args](int place) {
    const int item = first_item(args.attention) + place;
    return item < end_of_items(args.attention) ? item : kNoItem;
  };
  const bool deals = thread_index() == Traits::kConsumerThreads;
  if (deals) items.put(item_at(block_index()));
  while (items.wait() != kNoItem) {
    if (deals) {
      const int first = first_item(args.attention);
      const auto last = static_cast<uint32_t>(end_of_items(args.attention) - first - 1);
      const uint32_t ticket = take_ticket(args.attention.tickets, last);
      ItemQueue<Traits>{items.turn + 1}.put(item_at(num_blocks() + static_cast<int>(ticket)));
    }
    sync_warp();
    for (int row = 0;; row += Traits::kRows) {
      const Item item = producer.item();
      if (row >= item.num_rows) break;
      producer.load_tiles(row, PrefillTiles<Traits>(producer.keys_of(item, row)));
    }
    items.advance();
  }
  producer.template publish<0>();
}

}  // namespace quire::device
