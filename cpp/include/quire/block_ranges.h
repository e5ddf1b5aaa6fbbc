// SPDX-License-Identifier: Apache-2.0
// Where KV blocks lie in memory: scatter lists, for whatever carries blocks elsewhere (RDMA, NIXL,
// a socket, a file).
//
//   std::vector<MemoryRange> from = export_blocks(pools, blocks);        // here
//   std::vector<MemoryRange> to = import_blocks(pools, other_blocks);    // there
//   for (const RangePair& piece : pair_ranges(from, to)) ...             // one-sided transfers
//   writev(socket, (const iovec*)from.data(), from.size());              // or a stream of bytes
//
// A pool is a tensor [num_blocks, ...] of any dtype and device, in any strides with the last
// dimension contiguous: both K and V of a layer, where a block of them is one piece, or K and V
// each on its own. The memory itself is never touched.
//
// A list names the bytes of pool 0's blocks in the order given, then those of pool 1, and so on;
// inside a block they come in the order of its strides, the longest first. So the two ends agree on
// what byte goes where if their pools have the same shapes (but for the number of blocks), dtypes
// and order of dimensions, however their blocks are numbered. Neighbours are merged.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "quire/tensor.h"

namespace quire {

struct MemoryRange {  // as POSIX's struct iovec
  void* data;
  size_t size;  // bytes, never 0
  friend bool operator==(const MemoryRange&, const MemoryRange&) = default;
};

// To be read. Throws InvalidArgument for a block id outside a pool.
std::vector<MemoryRange> export_blocks(std::span<const TensorView> pools,
                                       std::span<const int32_t> blocks);

// To be written. Throws InvalidArgument also for a block that is named twice, and for memory that
// is read-only or would be written twice.
std::vector<MemoryRange> import_blocks(std::span<const TensorView> pools,
                                       std::span<const int32_t> blocks);

struct RangePair {
  void* source;
  void* destination;
  size_t size;
  friend bool operator==(const RangePair&, const RangePair&) = default;
};

// Cuts two lists so that the n-th pieces have one size. Throws InvalidArgument unless both have as
// many bytes.
std::vector<RangePair> pair_ranges(std::span<const MemoryRange> sources,
                                   std::span<const MemoryRange> destinations);

}  // namespace quire
