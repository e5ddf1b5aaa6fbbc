// SPDX-License-Identifier: Apache-2.0
// The C interface of block_ranges.h.
#include "quire/block_ranges.h"

#include <vector>

#include "c_api/convert.h"

namespace quire::c {
namespace {

std::vector<TensorView> as_pools(const std::string& argument, const QuireTensor* pools,
                                 size_t num_pools) {
  std::vector<TensorView> views;
  for (const QuireTensor& pool : as_span(argument.c_str(), pools, num_pools))
    views.push_back(as_view(concat(argument, "[", views.size(), "]").c_str(), &pool));
  return views;
}

// A range has the same two members on both sides.
std::vector<MemoryRange> as_ranges(const char* argument, const QuireMemoryRange* ranges,
                                   size_t num_ranges) {
  std::vector<MemoryRange> result;
  for (const QuireMemoryRange& range : as_span(argument, ranges, num_ranges))
    result.push_back({range.data, range.size});
  return result;
}

void write_ranges(const char* argument, const std::vector<MemoryRange>& ranges,
                  QuireMemoryRange* buffer, size_t* size) {
  std::vector<QuireMemoryRange> values;
  for (const MemoryRange& range : ranges) values.push_back({range.data, range.size});
  write_array<QuireMemoryRange>(argument, values, buffer, size);
}

}  // namespace
}  // namespace quire::c

using namespace quire::c;

QuireStatus quire_export_blocks(const QuireTensor* pools, size_t num_pools, const int32_t* blocks,
                                size_t num_blocks, QuireMemoryRange* buffer, size_t* size) {
  return guard([&] {
    const auto ranges =
        quire::export_blocks(as_pools("quire_export_blocks: pools", pools, num_pools),
                             as_span("quire_export_blocks: blocks", blocks, num_blocks));
    write_ranges("quire_export_blocks: size", ranges, buffer, size);
  });
}

QuireStatus quire_import_blocks(const QuireTensor* pools, size_t num_pools, const int32_t* blocks,
                                size_t num_blocks, QuireMemoryRange* buffer, size_t* size) {
  return guard([&] {
    const auto ranges =
        quire::import_blocks(as_pools("quire_import_blocks: pools", pools, num_pools),
                             as_span("quire_import_blocks: blocks", blocks, num_blocks));
    write_ranges("quire_import_blocks: size", ranges, buffer, size);
  });
}

QuireStatus quire_pair_ranges(const QuireMemoryRange* sources, size_t num_sources,
                              const QuireMemoryRange* destinations, size_t num_destinations,
                              QuireRangePair* buffer, size_t* size) {
  return guard([&] {
    std::vector<QuireRangePair> values;
    for (const quire::RangePair& pair : quire::pair_ranges(
             as_ranges("quire_pair_ranges: sources", sources, num_sources),
             as_ranges("quire_pair_ranges: destinations", destinations, num_destinations)))
      values.push_back({pair.source, pair.destination, pair.size});
    write_array<QuireRangePair>("quire_pair_ranges: size", values, buffer, size);
  });
}
