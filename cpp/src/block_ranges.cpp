// SPDX-License-Identifier: Apache-2.0
#include "quire/block_ranges.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <utility>

#include "check.h"
#include "quire/error.h"

namespace quire {
namespace {

// The bytes of one block of a pool: pieces of `run` bytes at offsets from where the block begins.
struct BlockShape {
  std::vector<int64_t> offsets;
  int64_t run;
};

BlockShape shape_of_block(const TensorView& pool) {
  const int64_t element = static_cast<int64_t>(size_of(pool.dtype));
  std::vector<int> dims(pool.ndim - 1);
  std::iota(dims.begin(), dims.end(), 1);
  std::erase_if(dims, [&](int d) { return pool.shape[d] == 1; });
  std::stable_sort(dims.begin(), dims.end(), [&](int a, int b) {
    return std::abs(pool.strides[a]) > std::abs(pool.strides[b]);
  });
  BlockShape block{{0}, element};
  while (!dims.empty() && pool.strides[dims.back()] * element == block.run) {
    block.run *= pool.shape[dims.back()];
    dims.pop_back();
  }
  for (int d : dims) {
    std::vector<int64_t> offsets;
    offsets.reserve(block.offsets.size() * pool.shape[d]);
    for (int64_t offset : block.offsets)
      for (int64_t i = 0; i < pool.shape[d]; ++i)
        offsets.push_back(offset + i * pool.strides[d] * element);
    block.offsets = std::move(offsets);
  }
  return block;
}

void append(std::vector<MemoryRange>& ranges, std::byte* data, size_t size) {
  if (!ranges.empty() && static_cast<std::byte*>(ranges.back().data) + ranges.back().size == data)
    ranges.back().size += size;
  else
    ranges.push_back({data, size});
}

void check_pool(const std::string& argument, const TensorView& pool, bool is_written) {
  QUIRE_CHECK_ARG(pool.ndim >= 2, argument, ": expected [num_blocks, ...], got ", describe(pool));
  const std::vector<Extent> any(pool.ndim, Extent{""});
  if (is_written)
    check_output(argument, pool, any, pool.dtype, pool.device);
  else
    check_tensor(argument, pool, any, pool.dtype, pool.device);
}

std::vector<MemoryRange> ranges_of(const std::string& function, std::span<const TensorView> pools,
                                   std::span<const int32_t> blocks, bool is_written) {
  for (size_t p = 0; p < pools.size(); ++p) {
    check_pool(concat(function, ": pools[", p, "]"), pools[p], is_written);
    const int64_t num_blocks = pools[p].shape[0];
    for (size_t i = 0; i < blocks.size(); ++i)
      QUIRE_CHECK_ARG(blocks[i] >= 0 && blocks[i] < num_blocks, function, ": blocks[", i,
                      "]: expected a block id in [0, ", num_blocks, ") of pools[", p, "], got ",
                      blocks[i]);
  }
  std::vector<MemoryRange> ranges;
  for (const TensorView& pool : pools) {
    if (pool.is_empty()) continue;
    const BlockShape block = shape_of_block(pool);
    const int64_t stride = pool.strides[0] * static_cast<int64_t>(size_of(pool.dtype));
    for (int32_t id : blocks)
      for (int64_t offset : block.offsets)
        append(ranges, pool.as<std::byte>() + id * stride + offset, block.run);
  }
  return ranges;
}

size_t total_size(const char* argument, std::span<const MemoryRange> ranges) {
  size_t total = 0;
  for (const MemoryRange& range : ranges) {
    QUIRE_CHECK_ARG(total + range.size >= total, argument,
                    ": expected sizes of memory, got a sum beyond 2^64");
    total += range.size;
  }
  return total;
}

void check_apart(std::vector<MemoryRange> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const MemoryRange& a, const MemoryRange& b) {
    return std::less<void*>()(a.data, b.data);
  });
  const auto overlap = std::adjacent_find(
      ranges.begin(), ranges.end(), [](const MemoryRange& a, const MemoryRange& b) {
        return static_cast<std::byte*>(a.data) + a.size > static_cast<std::byte*>(b.data);
      });
  QUIRE_CHECK_ARG(overlap == ranges.end(),
                  "import_blocks: pools: expected each byte once, got memory that overlaps");
}

}  // namespace

std::vector<MemoryRange> export_blocks(std::span<const TensorView> pools,
                                       std::span<const int32_t> blocks) {
  return ranges_of("export_blocks", pools, blocks, false);
}

std::vector<MemoryRange> import_blocks(std::span<const TensorView> pools,
                                       std::span<const int32_t> blocks) {
  std::vector<int32_t> sorted(blocks.begin(), blocks.end());
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  QUIRE_CHECK_ARG(twice == sorted.end(), "import_blocks: blocks: expected each block once, got ",
                  *twice, " twice");
  std::vector<MemoryRange> ranges = ranges_of("import_blocks", pools, blocks, true);
  check_apart(ranges);
  return ranges;
}

std::vector<RangePair> pair_ranges(std::span<const MemoryRange> sources,
                                   std::span<const MemoryRange> destinations) {
  const size_t expected = total_size("pair_ranges: sources", sources);
  const size_t got = total_size("pair_ranges: destinations", destinations);
  QUIRE_CHECK_ARG(expected == got, "pair_ranges: destinations: expected ", expected,
                  " bytes, as the sources have, got ", got);
  std::vector<RangePair> pairs;
  pairs.reserve(sources.size() + destinations.size());
  size_t to = 0, used = 0;  // the destination that is being filled, and its bytes so far
  for (const MemoryRange& source : sources) {
    for (size_t done = 0; done < source.size;) {
      for (; used == destinations[to].size; used = 0) ++to;
      const size_t size = std::min(source.size - done, destinations[to].size - used);
      pairs.push_back({static_cast<std::byte*>(source.data) + done,
                       static_cast<std::byte*>(destinations[to].data) + used, size});
      done += size;
      used += size;
    }
  }
  return pairs;
}

}  // namespace quire
