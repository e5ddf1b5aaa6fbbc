// SPDX-License-Identifier: Apache-2.0
// Scatter lists of blocks: the bytes that they name, merged and cut, in C++ and in C.
#include "quire/block_ranges.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "quire/error.h"
#include "quire/quire.h"

using namespace quire;

namespace {

// [num_blocks, 2 heads, 3 tokens, 4 dims] in one of three layouts, every element another number.
struct Pool {
  std::vector<float> memory;
  TensorView view;

  Pool(int64_t num_blocks, int layout, float first)
      : memory(num_blocks * 24), view(memory.data(), DType::kFloat32, {num_blocks, 2, 3, 4}) {
    std::iota(memory.begin(), memory.end(), first);
    if (layout == 1)  // tokens before heads
      view.strides = {24, 4, 8, 1};
    if (layout == 2)  // heads before blocks: a block is two pieces
      view.strides = {12, num_blocks * 12, 4, 1};
  }
};

std::vector<std::byte> bytes_of(std::span<const MemoryRange> ranges) {
  std::vector<std::byte> bytes;
  for (const MemoryRange& range : ranges) {
    const auto* data = static_cast<const std::byte*>(range.data);
    bytes.insert(bytes.end(), data, data + range.size);
  }
  return bytes;
}

std::string error_of(auto call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("neighbouring blocks are one range, others are not") {
  Pool pool(8, 0, 0);
  const int32_t blocks[] = {2, 3, 4, 7, 6};
  const auto ranges = export_blocks({&pool.view, 1}, blocks);
  const std::vector<MemoryRange> expected = {
      {&pool.memory[48], 288}, {&pool.memory[168], 96}, {&pool.memory[144], 96}};
  CHECK(ranges == expected);
  CHECK(export_blocks({&pool.view, 1}, {}).empty());
  CHECK(export_blocks({}, {}).empty());
  Pool empty(0, 0, 0);
  CHECK(export_blocks({&empty.view, 1}, {}).empty());
}

TEST_CASE("in every layout the lists of two ends name the same elements") {
  std::mt19937 random(3);
  for (int layout : {0, 1, 2}) {
    CAPTURE(layout);
    Pool k(9, layout, 1000), v(9, layout, 2000), other_k(12, layout, 5000),
        other_v(12, layout, 6000);
    std::vector<int32_t> from(9), to(12);
    std::iota(from.begin(), from.end(), 0);
    std::iota(to.begin(), to.end(), 0);
    std::shuffle(from.begin(), from.end(), random);
    std::shuffle(to.begin(), to.end(), random);
    from.resize(6), to.resize(6);
    const std::vector<TensorView> pools = {k.view, v.view};
    const std::vector<TensorView> others = {other_k.view, other_v.view};
    const auto sources = export_blocks(pools, from), destinations = import_blocks(others, to);
    CHECK(bytes_of(sources).size() == 2 * 6 * 96);
    for (const RangePair& pair : pair_ranges(sources, destinations)) {
      CHECK(pair.size > 0);
      std::memcpy(pair.destination, pair.source, pair.size);
    }
    CHECK(bytes_of(sources) == bytes_of(destinations));
    for (size_t p = 0; p < 2; ++p)
      for (size_t i = 0; i < from.size(); ++i)
        for (int64_t element = 0; element < 24; ++element) {
          const auto at = [&](const TensorView& view, int32_t block) {
            return view.as<float>()[block * view.strides[0] + element / 12 * view.strides[1] +
                                    element / 4 % 3 * view.strides[2] + element % 4];
          };
          CHECK(at(others[p], to[i]) == at(pools[p], from[i]));
        }
    // No block but those was written.
    const float written = 6 * 24, total = 12 * 24;
    CHECK(std::count_if(other_k.memory.begin(), other_k.memory.end(),
                        [](float x) { return x >= 5000; }) == total - written);
  }
}

TEST_CASE("a slice of the heads is pieces of the pool") {
  Pool pool(4, 0, 0);
  TensorView second_head = pool.view;
  second_head.data = &pool.memory[12];
  second_head.shape[1] = 1;
  const int32_t blocks[] = {1, 2};
  const std::vector<MemoryRange> expected = {{&pool.memory[36], 48}, {&pool.memory[60], 48}};
  CHECK(import_blocks({&second_head, 1}, blocks) == expected);
}

TEST_CASE("refusals name the argument") {
  Pool pool(4, 0, 0), small(2, 0, 0);
  const std::vector<TensorView> pools = {pool.view, small.view};
  const int32_t outside[] = {0, 2}, negative[] = {-1}, twice[] = {1, 0, 1}, one[] = {1};
  CHECK(error_of([&] { export_blocks(pools, outside); }) ==
        "export_blocks: blocks[1]: expected a block id in [0, 2) of pools[1], got 2");
  CHECK(error_of([&] { import_blocks(pools, negative); }).find("blocks[0]") != std::string::npos);
  CHECK(error_of([&] { import_blocks(pools, twice); }) ==
        "import_blocks: blocks: expected each block once, got 1 twice");
  CHECK(export_blocks(pools, twice).size() == 4);  // 0 and 1 are neighbours
  const std::vector<TensorView> same = {pool.view, pool.view};
  CHECK(error_of([&] { import_blocks(same, one); }).find("overlaps") != std::string::npos);
  TensorView read_only = pool.view, broadcast = pool.view, strided = pool.view, flat = pool.view;
  read_only.read_only = true;
  broadcast.strides[1] = 0;
  strided.strides[3] = 2;
  flat.ndim = 1;
  CHECK(export_blocks({&read_only, 1}, one).size() == 1);
  for (const TensorView& view : {read_only, broadcast, strided, flat})
    CHECK(error_of([&] {
            import_blocks({&view, 1}, one);
          }).find("import_blocks: pools[0]: expected") == 0);
  const MemoryRange range = {pool.memory.data(), 8}, huge = {pool.memory.data(), SIZE_MAX};
  CHECK(error_of([&] { pair_ranges({&range, 1}, {}); }) ==
        "pair_ranges: destinations: expected 8 bytes, as the sources have, got 0");
  const MemoryRange wraps[] = {huge, range};
  CHECK(error_of([&] { pair_ranges(wraps, {&range, 1}); }).find("2^64") != std::string::npos);
}

TEST_CASE("the C interface gives the same lists") {
  Pool pool(8, 2, 0);
  const int64_t shape[] = {8, 2, 3, 4};
  QuireTensor tensor = quire_tensor(pool.memory.data(), QUIRE_FLOAT32, 4, shape);
  for (int i = 0; i < 4; ++i) tensor.strides[i] = pool.view.strides[i];
  const int32_t blocks[] = {5, 1}, outside[] = {8};
  size_t size = 0;
  REQUIRE(quire_export_blocks(&tensor, 1, blocks, 2, nullptr, &size) == QUIRE_OK);
  std::vector<QuireMemoryRange> from(size), to(size);
  REQUIRE(quire_export_blocks(&tensor, 1, blocks, 2, from.data(), &size) == QUIRE_OK);
  REQUIRE(quire_import_blocks(&tensor, 1, blocks, 2, to.data(), &size) == QUIRE_OK);
  const auto expected = export_blocks({&pool.view, 1}, blocks);
  REQUIRE(size == expected.size());
  for (size_t i = 0; i < size; ++i)
    CHECK((from[i].data == expected[i].data && from[i].size == expected[i].size &&
           to[i].data == expected[i].data));
  size_t num_pairs = 0;
  REQUIRE(quire_pair_ranges(from.data(), size, to.data(), size, nullptr, &num_pairs) == QUIRE_OK);
  CHECK(num_pairs == size);
  std::vector<QuireRangePair> pairs(num_pairs);
  REQUIRE(quire_pair_ranges(from.data(), size, to.data(), size, pairs.data(), &num_pairs) ==
          QUIRE_OK);
  CHECK((pairs[0].source == from[0].data && pairs[0].size == from[0].size));
  size = 1;
  CHECK(quire_export_blocks(&tensor, 1, blocks, 2, from.data(), &size) == QUIRE_INVALID_ARGUMENT);
  CHECK(size == 1);
  CHECK(quire_import_blocks(&tensor, 1, outside, 1, nullptr, &size) == QUIRE_INVALID_ARGUMENT);
  CHECK(std::string(quire_last_error()).find("[0, 8)") != std::string::npos);
  CHECK(quire_export_blocks(nullptr, 1, blocks, 2, nullptr, &size) == QUIRE_INVALID_ARGUMENT);
}
