// SPDX-License-Identifier: Apache-2.0
// Queries in shared memory as products of warpgroups read them: in columns of 64 elements.
#pragma once

#include "kernels/sm90/producer.h"

namespace quire::device {

// Query rows [first_row, first_row + kRows) of an item, which a team (see BlockTeam) brings for
// itself; rows and columns that do not exist are zero. kUnroll: copies that a thread prepares at
// once.
template <class Traits, class Team, int kUnroll>
QUIRE_DEVICE void load_query_columns(const AttentionArgs& args, const Item& item, int first_row) {
  constexpr int kPieces = Traits::kKeyDim / kPiece;
  const AttentionParams& p = args.params;
  const auto* q = static_cast<const uint16_t*>(p.q) + item.sequence_index * p.q_stride_seq;
  Team::sync();  // before the queries in use are overwritten
  QUIRE_UNROLL_BY(kUnroll)
  for (int i = Team::index(); i < Traits::kRows * kPieces; i += Team::kThreads) {
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
  Team::sync();
}

}  // namespace quire::device
