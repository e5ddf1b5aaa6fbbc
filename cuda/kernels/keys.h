// SPDX-License-Identifier: Apache-2.0
// Where keys and values lie: position in the sequence -> (block, row), and from there to memory.
#pragma once

#include "kernels/tile.h"

namespace quire::device {

// Of a paged cache a block id and a row in it; else block 0 and a row of k and v.
struct Location {
  int block, row;
};

// Keys outside of `range` have no location, and their table entries are not looked at.
QUIRE_DEVICE Location locate(const AttentionParams& p, const Item& item, KeyRange range, int key) {
  if (key < range.begin || key >= range.end) return {0, 0};
  if (p.block_table == nullptr) return {0, item.sequence.kv_row + key};
  const int64_t entry = item.sequence.kv_row * p.block_table_stride + key / p.block_size;
  return {ld_global(p.block_table + entry), key % p.block_size};
}

// K and V of one sequence and kv head.
template <class Traits>
struct KeySource {
  using Bits = typename Traits::KvType::Bits;
  const Bits *k, *v;

  QUIRE_DEVICE KeySource(const AttentionParams& p, const Item& item)
      : k(static_cast<const Bits*>(p.k) + item.sequence_index * p.k_stride_seq +
          item.kv_head * p.k_stride_head),
        v(static_cast<const Bits*>(p.v) + item.sequence_index * p.v_stride_seq +
          item.kv_head * p.v_stride_head) {}

  // Brings piece `piece` of one key's K and V row to shared memory; `exists`: else zeros.
  QUIRE_DEVICE void load(const AttentionArgs& args, Location at, bool exists, int piece,
                         SharedAddress k_to, SharedAddress v_to) const {
    const AttentionParams& p = args.params;
    const int column = piece * Traits::kKvPiece;
    load_key(args, at, exists, piece, k_to);
    load_piece<Traits::kMode>(v_to,
                              v + at.block * p.v_stride_block + at.row * p.v_stride_row + column,
                              exists ? p.head_dim_v - column : 0, args.is_aligned);
  }

  // That of the K row alone.
  QUIRE_DEVICE void load_key(const AttentionArgs& args, Location at, bool exists, int piece,
                             SharedAddress to) const {
    const AttentionParams& p = args.params;
    const int column = piece * Traits::kKvPiece;
    load_piece<Traits::kMode>(to,
                              k + at.block * p.k_stride_block + at.row * p.k_stride_row + column,
                              exists ? p.head_dim - column : 0, args.is_aligned);
  }
};

}  // namespace quire::device
