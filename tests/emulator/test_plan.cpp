// SPDX-License-Identifier: Apache-2.0
// The planner on the device against the one on the host: the same lists, word for word.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "emulator/launch.h"
#include "kernels/plan.h"
#include "quire/attention.h"

namespace quire::device {
namespace {

using Traits = PlannerTraits<512>;

struct Case {
  AttentionDesc desc;
  quire::PlanTraits cut;
  int64_t wide_rows = std::numeric_limits<int64_t>::max();
  std::vector<std::pair<int, int>> lengths = {};  // query rows, keys
  bool one_row_each = false;
};

// What the device leaves of a batch, with room for exactly what the host has planned and guards
// around it.
struct Planned {
  std::vector<Sequence> sequences;
  std::vector<WorkItem> items;
  std::vector<MergeItem> merges;
  std::vector<uint32_t> counters;
  PlanCounts counts;
  std::string error;
};

struct Lengths {
  std::vector<int32_t> seq_lens, cu = {0};
  explicit Lengths(const Case& c) {
    for (const auto& [rows, keys] : c.lengths) {
      seq_lens.push_back(keys);
      cu.push_back(cu.back() + rows);
    }
  }
};

// Unlike ids, so that no plan depends on them.
AttentionPlan plan_on_host(const Case& c, const Lengths& lengths) {
  int blocks = 0;
  for (int32_t keys : lengths.seq_lens)
    blocks = std::max(blocks, (keys + c.desc.block_size - 1) / c.desc.block_size);
  const std::vector<int32_t> table(lengths.seq_lens.size() * blocks, 3);
  AttentionBatch batch;
  batch.batch_size = static_cast<int>(lengths.seq_lens.size());
  batch.seq_lens = lengths.seq_lens.data();
  batch.cu_seqlens_q = c.one_row_each ? nullptr : lengths.cu.data();
  batch.block_table = table.data();
  batch.block_table_stride = batch.max_blocks = blocks;
  return quire::plan(c.desc, batch, c.cut);
}

PlanArgs args_of(const Case& c, const Lengths& lengths) {
  PlanArgs args{};
  args.seq_lens = lengths.seq_lens.data();
  args.cu_seqlens_q = c.one_row_each ? nullptr : lengths.cu.data();
  args.num_sequences = static_cast<int>(lengths.seq_lens.size());
  args.max_total_q = c.one_row_each ? args.num_sequences : lengths.cu.back() + 7;
  args.max_seq_len = 1 << 28;
  args.group = c.desc.num_heads / c.desc.num_kv_heads;
  args.num_kv_heads = c.desc.num_kv_heads;
  args.window_left = c.desc.window_left;
  args.window_right = c.desc.causal ? 0 : c.desc.window_right;
  args.parallelism = c.cut.parallelism;
  args.tile_rows = std::max(1, c.cut.max_rows / args.group);
  args.decode_rows = 32;
  args.wide_rows = c.wide_rows;
  return args;
}

Planned plan_on_device(const PlanArgs& given, const AttentionPlan& host, int max_tiles,
                       uint32_t seed) {
  Planned made;
  made.sequences.assign(given.num_sequences, {-7, -7, -7, -7});
  made.items.assign(host.items.size(), {-7, -7, -7, -7, -7, -7, -7, -7});
  made.merges.assign(host.merges.size(), {-7, -7, -7, -7, -7, -7, -7});
  made.counters.assign(host.merges.size(), 7);
  std::memset(&made.counts, 0x77, sizeof made.counts);
  std::vector<int32_t> first_tiles(given.num_sequences, -7);
  std::vector<PlanTile> tiles(max_tiles);
  PlanArgs args = given;
  args.max_tiles = max_tiles;
  args.sequences = made.sequences.data();
  args.items = made.items.data();
  args.merges = made.merges.data();
  args.counters = made.counters.data();
  args.counts = &made.counts;
  args.first_tiles = first_tiles.data();
  args.tiles = tiles.data();
  emulator::Options options;
  options.seed = seed;
  const auto allow = [&options](const void* data, size_t bytes) {
    options.global.allow(data, bytes);
  };
  const size_t n = given.num_sequences;
  allow(args.seq_lens, n * 4), allow(args.cu_seqlens_q, args.cu_seqlens_q ? (n + 1) * 4 : 0);
  allow(args.sequences, n * sizeof(Sequence)), allow(args.first_tiles, n * 4);
  allow(args.items, made.items.size() * sizeof(WorkItem));
  allow(args.merges, made.merges.size() * sizeof(MergeItem));
  allow(args.counters, made.counters.size() * 4), allow(args.counts, sizeof made.counts);
  allow(args.tiles, tiles.size() * sizeof(PlanTile));
  made.error = emulator::launch({1, Traits::kThreads, Traits::kSharedBytes}, options, [&] {
                 plan<Traits>(args);
               }).error;
  return made;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

int num_tiles(const Case& c, const PlanArgs& args) {
  int tiles = 0;
  for (const auto& [rows, keys] : c.lengths)
    tiles += ((c.one_row_each ? 1 : rows) + args.tile_rows - 1) / args.tile_rows;
  return tiles;
}

void check(const Case& c, uint32_t seed) {
  const Lengths lengths(c);
  const AttentionPlan host = plan_on_host(c, lengths);
  const PlanArgs args = args_of(c, lengths);
  const Planned device = plan_on_device(args, host, num_tiles(c, args), seed);
  REQUIRE(device.error == "");
  REQUIRE(device.counts.num_items == static_cast<int>(host.items.size()));
  REQUIRE(device.counts.num_merges == static_cast<int>(host.merges.size()));
  CHECK(device.counts.num_partials == host.num_partials);
  // By phase, else as they came: how the host sorts what it sends to a GPU.
  std::vector<WorkItem> sorted;
  const auto phase_of = [&](const WorkItem& item) {
    const int64_t rows = int64_t{host.sequences[item.sequence].q_len} * args.group;
    return rows <= args.decode_rows ? kDecode : rows >= args.wide_rows ? kWide : kNarrow;
  };
  for (const Phase phase : {kWide, kNarrow, kDecode}) {
    const int begin = static_cast<int>(sorted.size());
    for (const WorkItem& item : host.items)
      if (phase_of(item) == phase) sorted.push_back(item);
    const int end = static_cast<int>(sorted.size());
    const ItemRange& range = device.counts.ranges[phase];
    CHECK(range.end - range.begin == end - begin);
    if (begin < end) CHECK(range.begin == begin);
  }
  CHECK(same(device.items, sorted));
  CHECK(same(device.merges, host.merges));
  CHECK(std::all_of(device.counters.begin(), device.counters.end(),
                    [](uint32_t count) { return count == 0; }));
  std::vector<Sequence> sequences = host.sequences;
  for (size_t i = 0; i < sequences.size(); ++i) sequences[i].kv_row = static_cast<int>(i);
  CHECK(same(device.sequences, sequences));
}

AttentionDesc model(int num_heads, int num_kv_heads) {
  AttentionDesc desc;
  desc.num_heads = num_heads;
  desc.num_kv_heads = num_kv_heads;
  desc.head_dim = 128;
  desc.block_size = 512;
  return desc;
}

TEST_CASE("the lists of decode batches are those of the host") {
  Case c{model(64, 8), {132, 128}};
  c.one_row_each = true;
  SUBCASE("equal") { c.lengths.assign(64, {1, 8192}); }
  SUBCASE("skewed") {
    c.lengths.assign(31, {1, 4096});
    c.lengths.push_back({1, 65536});
  }
  SUBCASE("one, long") { c.lengths = {{1, 200'000}}; }
  SUBCASE("one, empty") { c.lengths = {{1, 0}}; }
  SUBCASE("none") {}
  SUBCASE("more than there are threads") {
    for (int i = 0; i < 1200; ++i) c.lengths.push_back({1, i * 37 % 3000});
  }
  SUBCASE("one worker") {
    c.cut.parallelism = 1;
    c.lengths = {{1, 10'000}, {1, 5}};
  }
  check(c, 1);
}

TEST_CASE("the lists of mixed batches are those of the host") {
  Case c{model(32, 8), {132, 128}, 128};
  c.lengths = {{1, 9000}, {700, 700}, {0, 100}, {1, 1}, {33, 5000}, {8, 8192}, {5, 2}, {0, 0}};
  SUBCASE("causal") {}
  SUBCASE("not causal") { c.desc.causal = false; }
  SUBCASE("window") { c.desc.window_left = 600; }
  SUBCASE("window on both sides") {
    c.desc.causal = false;
    c.desc.window_left = 50, c.desc.window_right = 700;
  }
  SUBCASE("more heads than rows of an item") { c.desc.num_kv_heads = 1, c.cut.max_rows = 16; }
  SUBCASE("no wide tile") { c.wide_rows = std::numeric_limits<int64_t>::max(); }
  check(c, 2);
}

TEST_CASE("random batches") {
  std::mt19937 random(17);
  const auto draw = [&random](int most) { return static_cast<int>(random() % (most + 1u)); };
  for (int round = 0; round < 60; ++round) {
    const int kv_heads = 1 << draw(3);
    Case c{model(kv_heads * (1 + draw(9)), kv_heads), {1 + draw(draw(1) ? 200 : 3), 16 << draw(3)}};
    c.wide_rows = draw(1) ? 64 << draw(3) : std::numeric_limits<int64_t>::max();
    c.desc.causal = draw(3) > 0;
    if (draw(2) == 0) c.desc.window_left = draw(3000);
    if (draw(2) == 0) c.desc.window_right = draw(600);
    const int most_keys = draw(1) ? 3000 : 40'000, most_rows = draw(1) ? 4 : 300;
    for (int i = draw(40); i > 0; --i) c.lengths.push_back({draw(most_rows), draw(most_keys)});
    c.one_row_each = draw(3) == 0;
    CAPTURE(round);
    check(c, round);
  }
}

// Whatever the lengths say, nothing is written but the lists, and their rows and keys are there.
TEST_CASE("lengths that make no sense") {
  Case c{model(8, 2), {20, 64}};
  c.lengths.assign(6, {1, 1});
  Lengths lengths(c);
  PlanArgs args = args_of(c, lengths);
  args.max_total_q = 100;
  args.max_seq_len = 2000;
  lengths.seq_lens = {-5, 3000, std::numeric_limits<int32_t>::max(), 7, 0, INT32_MIN};
  lengths.cu = {5, 400, -3, 90, 0, 100, 60};
  const int max_tiles = 12;
  AttentionPlan room;  // of which the planner is to use no more
  room.items.resize(2 * (max_tiles + 80));
  room.merges.resize(room.items.size());
  const Planned made = plan_on_device(args, room, max_tiles, 3);
  REQUIRE(made.error == "");
  for (const Sequence& s : made.sequences) {
    CHECK(s.q_begin >= 0);
    CHECK(s.q_len >= 0);
    CHECK(s.q_begin + s.q_len <= 100);
    CHECK(s.seq_len >= 0);
    CHECK(s.seq_len <= 2000);
  }
  CHECK(made.counts.num_items > 0);
  for (int i = 0; i < made.counts.num_items; ++i) {
    const WorkItem& item = made.items[i];
    CHECK(item.q_end <= made.sequences[item.sequence].q_len);
    CHECK(item.kv_end <= made.sequences[item.sequence].seq_len);
  }
}

}  // namespace
}  // namespace quire::device
