// SPDX-License-Identifier: Apache-2.0
// Attention's gradients on the thread pool: what the kernels (backward_kernel.h) share.
//
// The rows of one sequence and kv head are cut into tiles, its keys into chunks. A chunk's dk and
// dv are one piece of work that goes through all tiles. dq of a tile sums over chunks, in their
// order: each waits for its turn. Pieces are started in that order too, so none waits for ever.
#pragma once

#include <atomic>
#include <cstdint>

#include "quire/backward_params.h"

namespace quire::cpu {

// Multiples of what the matrix products of every tier work on at a time.
constexpr int kBackwardRows = 96;
constexpr int kBackwardKeys = 96;

// One sequence and kv head.
struct BackwardHead {
  int32_t sequence;
  int32_t kv_head;
  int64_t first_row;   // index of its first row among those of all heads
  int64_t first_tile;  // likewise of its tiles
};

// What the pieces of work of one call share.
struct BackwardRun {
  const BackwardParams& params;
  float* deltas;                // [rows]: dout . out
  float* dq;                    // [rows][head_dim], sums; null: dq is float itself
  std::atomic<int32_t>* turns;  // [tiles]: the chunk that may add to dq next
  std::atomic<bool> has_failed = false;

  // False: another piece has failed, the turn will never come.
  bool await_turn(int64_t tile, int32_t chunk) const;
};

void attention_backward(const BackwardParams& params);

}  // namespace quire::cpu
