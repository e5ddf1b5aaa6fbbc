// SPDX-License-Identifier: Apache-2.0
// Attention's gradients: the list of work, and the memory that it shares.
#include "cpu/backward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {
namespace {

// A tile of rows or a chunk of keys.
struct Piece {
  const BackwardHead* head;
  int index;
};

int pieces_of(int64_t count, int size) { return static_cast<int>((count + size - 1) / size); }

// All heads, their rows and tiles numbered through.
struct Heads {
  explicit Heads(const BackwardParams& params) : group(group_of(params)) {
    for (int b = 0; b < params.num_sequences; ++b)
      for (int kv_head = 0; kv_head < params.forward.num_kv_heads; ++kv_head) {
        list.push_back({b, kv_head, num_rows, num_tiles});
        const int64_t rows = int64_t{params.forward.sequences[b].q_len} * group;
        num_rows += rows;
        num_tiles += pieces_of(rows, kBackwardRows);
      }
  }
  static int group_of(const BackwardParams& params) {
    return params.forward.num_heads / params.forward.num_kv_heads;
  }

  int group;
  std::vector<BackwardHead> list;
  int64_t num_rows = 0, num_tiles = 0;
};

std::vector<Piece> tiles_of(const BackwardParams& params, const Heads& heads) {
  std::vector<Piece> tiles;
  tiles.reserve(heads.num_tiles);
  for (const BackwardHead& head : heads.list) {
    const int64_t rows = int64_t{params.forward.sequences[head.sequence].q_len} * heads.group;
    for (int i = 0; i < pieces_of(rows, kBackwardRows); ++i) tiles.push_back({&head, i});
  }
  return tiles;
}

// First the first chunks of all heads: under a causal mask those are the longest, and few have to
// wait for their turn.
std::vector<Piece> chunks_of(const BackwardParams& params, const Heads& heads) {
  std::vector<Piece> chunks;
  for (int i = 0, added = 1; added > 0; ++i) {
    added = 0;
    for (const BackwardHead& head : heads.list)
      if (i < pieces_of(params.forward.sequences[head.sequence].seq_len, kBackwardKeys)) {
        chunks.push_back({&head, i});
        ++added;
      }
  }
  return chunks;
}

// A sink is a key without a value: its probability times -dout . out, over all rows in order.
float sink_gradient(const BackwardRun& run, const Heads& heads, int head) {
  const AttentionParams& p = run.params.forward;
  double sum = 0;
  for (const BackwardHead& kv : heads.list) {
    if (kv.kv_head != head / heads.group) continue;
    const Sequence& sequence = p.sequences[kv.sequence];
    const float* lse = p.lse + kv.sequence * p.lse_stride_seq +
                       sequence.q_begin * p.lse_stride_row + head * p.lse_stride_head;
    const float* deltas = run.deltas + kv.first_row + head % heads.group;
    for (int64_t i = 0; i < sequence.q_len; ++i) {
      const float row_lse = lse[i * p.lse_stride_row];
      if (row_lse == -std::numeric_limits<float>::infinity()) continue;
      sum -= std::exp(static_cast<double>(p.sinks[head]) - row_lse) * deltas[i * heads.group];
    }
  }
  return static_cast<float>(sum);
}

}  // namespace

bool BackwardRun::await_turn(int64_t tile, int32_t chunk) const {
  for (int spins = 0; turns[tile].load(std::memory_order_acquire) != chunk; ++spins) {
    if (has_failed) return false;
    if (spins > 64) std::this_thread::yield();
  }
  return true;
}

void attention_backward(const BackwardParams& params) {
  const Heads heads(params);
  const bool sums_in_place = params.forward.dtype == ElementType::kFloat32;
  const auto deltas = std::make_unique_for_overwrite<float[]>(heads.num_rows);
  const auto dq = std::make_unique_for_overwrite<float[]>(
      sums_in_place ? 0 : heads.num_rows * params.forward.head_dim);
  const auto turns = std::make_unique<std::atomic<int32_t>[]>(heads.num_tiles);
  BackwardRun run{params, deltas.get(), sums_in_place ? nullptr : dq.get(), turns.get()};
  const Kernels& kernels = kernels_in_use();

  const std::vector<Piece> tiles = tiles_of(params, heads);
  parallel_for(static_cast<int64_t>(tiles.size()),
               [&](int64_t i) { kernels.prepare_backward(run, *tiles[i].head, tiles[i].index); });
  const std::vector<Piece> chunks = chunks_of(params, heads);
  parallel_for(static_cast<int64_t>(chunks.size()), [&](int64_t i) {
    try {
      kernels.backward(run, *chunks[i].head, chunks[i].index);
    } catch (...) {
      run.has_failed = true;
      throw;
    }
  });
  if (!params.dsinks) return;
  parallel_for(params.forward.num_heads, [&](int64_t head) {
    params.dsinks[head] = sink_gradient(run, heads, static_cast<int>(head));
  });
}

}  // namespace quire::cpu
