// SPDX-License-Identifier: Apache-2.0
// States of rows over runs of chunks: folding them left to right, their final form, and partial
// results that several blocks leave for the last of them to fold.
//
// Whether chunks are folded as they come or from memory later, the same operations happen in the
// same order, each with its rounding spelled out: the bits are the same.
#pragma once

#include "kernels/softmax.h"
#include "kernels/tile.h"

namespace quire::device {

// By what the values so far and those of the next chunk are to be multiplied.
struct FoldScales {
  float total, chunk;

  QUIRE_DEVICE float apply(float total_value, float chunk_value) const {
    return fma(total_value, total, mul(chunk_value, chunk));
  }
};

QUIRE_DEVICE FoldScales fold(RowStats& total, const RowStats& chunk) {
  const float top = max(total.max, chunk.max);
  const float base = finite_or_zero(top);
  const FoldScales scales{exp2(total.max - base), exp2(chunk.max - base)};
  total = {top, scales.apply(total.sum, chunk.sum)};
  return scales;
}

// Normalises and writes eight columns of one row, and with the first of them the row's lse.
template <class Traits>
QUIRE_DEVICE void write_row(const AttentionArgs& args, const Item& item, int row, int column,
                            RowStats stats, float (&values)[kPiece]) {
  const AttentionParams& p = args.params;
  const int head = item.head(row);
  const bool sees_a_key = stats.sum != 0;
  float scale = 1;
  if (p.sinks && sees_a_key) scale = fold(stats, {ld_global(p.sinks + head) * kLog2E, 1.0f}).total;
  float factor = mul(scale, rcp(stats.sum));
  if (Traits::kIsQuantised) factor = mul(factor, item_scale(p.v_scale, item.kv_head));
  QUIRE_UNROLL
  for (float& value : values)
    value = sees_a_key ? fma(value, factor, 0.0f) : 0.0f;  // + 0: no negative zeros
  auto* out = static_cast<uint16_t*>(p.out) + item.sequence_index * p.out_stride_seq +
              item.batch_row(row) * p.out_stride_row + head * p.out_stride_head + column;
  store_piece<typename Traits::Type, Traits::kMode>(out, values, p.head_dim_v - column,
                                                    args.is_aligned);
  if (p.lse && column == 0) {
    const int64_t offset = item.sequence_index * p.lse_stride_seq + head * p.lse_stride_head +
                           item.batch_row(row) * p.lse_stride_row;
    st_global(p.lse + offset, sees_a_key ? mul(stats.max + log2(stats.sum), kLn2) : -kInfinity);
  }
}

// --- Partial results -----------------------------------------------------------------------------

template <class Traits>
QUIRE_DEVICE float* partial_values(const AttentionArgs& args, int slot, int row) {
  return args.partial_values + (int64_t{slot} * args.partial_rows + row) * Traits::kHeadDim;
}

QUIRE_DEVICE F32x2* partial_stats(const AttentionArgs& args, int slot, int row) {
  return reinterpret_cast<F32x2*>(args.partial_stats) + int64_t{slot} * args.partial_rows + row;
}

QUIRE_DEVICE void load_floats(float (&values)[kPiece], const float* from) {
  const F32x4 low = ld_global(reinterpret_cast<const F32x4*>(from));
  const F32x4 high = ld_global(reinterpret_cast<const F32x4*>(from) + 1);
  const float loaded[kPiece] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  QUIRE_UNROLL
  for (int i = 0; i < kPiece; ++i) values[i] = loaded[i];
}

QUIRE_DEVICE void store_floats(float* to, const float (&values)[kPiece]) {
  st_global(reinterpret_cast<F32x4*>(to), F32x4{values[0], values[1], values[2], values[3]});
  st_global(reinterpret_cast<F32x4*>(to) + 1, F32x4{values[4], values[5], values[6], values[7]});
}

// Rows of an item that blocks leave results of, and the counter where they meet.
struct MergeRows {
  int counter, first, count;
};

QUIRE_DEVICE MergeRows all_rows(const Item& item) { return {item.merge, 0, item.num_rows}; }

// Slots [begin, end) of partial results.
struct SlotRange {
  int begin, end;
};

QUIRE_DEVICE SlotRange load_slots(const MergeItem* merge) {
  const int begin = ld_global(&merge->partial);
  return {begin, begin + ld_global(&merge->num_partials)};
}

// Folds slots [slot, slot + kAhead) of eight columns of a row, those that are below `end_slot`.
// What a thread waits for is loads, so they are made at once, and nothing depends on how many of
// the slots there are: behind a branch the compiler would load them where it folds them. A slot
// that is not there folds as a chunk without keys does, which changes nothing.
template <class Traits, int kAhead>
QUIRE_DEVICE void fold_slots(const AttentionArgs& args, int slot, int end_slot, int row, int column,
                             RowStats& total, float (&values)[kPiece]) {
  F32x2 stats[kAhead];
  float chunk[kAhead][kPiece];
  QUIRE_UNROLL
  for (int a = 0; a < kAhead; ++a) {
    const int there = min(slot + a, end_slot - 1);
    stats[a] = ld_global(partial_stats(args, there, row));
    load_floats(chunk[a], partial_values<Traits>(args, there, row) + column);
  }
  QUIRE_UNROLL
  for (int a = 0; a < kAhead; ++a) {
    const bool exists = slot + a < end_slot;
    const RowStats added{exists ? stats[a].x : -kInfinity, exists ? stats[a].y : 0.0f};
    const FoldScales scales = fold(total, added);
    QUIRE_UNROLL
    for (int e = 0; e < kPiece; ++e)
      values[e] = scales.apply(values[e], exists ? chunk[a][e] : 0.0f);
  }
}

// Threads of a block that do something together: kThreads of them, which index() counts and sync()
// waits for. Here all that there are.
template <int kThreads_>
struct BlockTeam {
  static constexpr int kThreads = kThreads_;
  QUIRE_DEVICE static int index() { return thread_index(); }
  QUIRE_DEVICE static void sync(Site site = Site::here()) { sync_block(site); }
};

// Folds all slots of the rows in chunk order and writes the rows. So many are loaded at once: a
// multiple of 4.
template <class Traits, int kAhead, class Team>
QUIRE_DEVICE void merge(const AttentionArgs& args, const Item& item, const MergeRows& rows,
                        SlotRange slots) {
  constexpr int kPieces = Traits::kHeadDim / kPiece;
  for (int i = Team::index(); i < rows.count * kPieces; i += Team::kThreads) {
    const int row = rows.first + i / kPieces, column = i % kPieces * kPiece;
    RowStats total;
    float values[kPiece] = {};
    int slot = slots.begin;
    if constexpr (kAhead > 4)
      for (; slot + kAhead <= slots.end; slot += kAhead)
        fold_slots<Traits, kAhead>(args, slot, slots.end, row, column, total, values);
    for (; slot < slots.end; slot += 4)
      fold_slots<Traits, 4>(args, slot, slots.end, row, column, total, values);
    write_row<Traits>(args, item, row, column, total, values);
  }
}

// Called by all of a team that has stored its block's partial results: in the last of the blocks
// that share the rows it merges them. `flag`: a word of shared memory. The lists are read before it
// is known who is the last, as the fence takes longer.
template <class Traits, int kAhead = 4, class Team = BlockTeam<Traits::kThreads>>
QUIRE_DEVICE void merge_if_last(const AttentionArgs& args, const Item& item, SharedAddress flag,
                                const MergeRows& rows, Team = {}) {
  const MergeItem* work = args.merges + item.merge;
  const SlotRange slots = load_slots(work);
  const auto last = static_cast<uint32_t>(ld_global(&work->num_items) - 1);
  fence_gpu();
  Team::sync();
  if (Team::index() == 0)
    st_shared<uint32_t>(flag, atomic_increment(args.counters + rows.counter, last) == last);
  Team::sync();
  if (!ld_shared<uint32_t>(flag)) return;
  fence_gpu();
  merge<Traits, kAhead, Team>(args, item, rows, slots);
}

}  // namespace quire::device
