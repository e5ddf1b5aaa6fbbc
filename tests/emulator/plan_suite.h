// SPDX-License-Identifier: Apache-2.0
// A planner of the device, as the host compiler or nvcc has made it, against the one on the host:
// the same lists, word for word.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "emulator/launch.h"
#include "kernels/launch.h"
#include "kernels/traits.h"
#include "quire/attention.h"

namespace quire::emulator {

using device::ItemRange;
using device::ListedItem;
using device::Phase;
using device::PlanArgs;
using device::PlanCounts;
using device::PlannerTraits;
using device::PlanTile;

using Planner = std::function<void(const PlanArgs&)>;  // one thread
using PlannerShape = PlannerTraits<512>;

struct PlanCase {
  AttentionDesc desc;
  quire::PlanTraits cut;
  int64_t wide_rows = std::numeric_limits<int64_t>::max();
  std::vector<std::pair<int, int>> lengths = {};  // query rows, keys
  bool one_row_each = false;
};

inline AttentionDesc plan_model(int num_heads, int num_kv_heads) {
  AttentionDesc desc;
  desc.num_heads = num_heads;
  desc.num_kv_heads = num_kv_heads;
  desc.head_dim = 128;
  desc.block_size = 512;
  return desc;
}

// What the device leaves of a batch, with room for exactly what the host has planned and guards
// around it.
struct Planned {
  std::vector<ListedItem> items;
  std::vector<MergeItem> merges;
  std::vector<uint32_t> counters;
  PlanCounts counts;
  std::string error;
};

struct PlanLengths {
  std::vector<int32_t> seq_lens, cu = {0};
  explicit PlanLengths(const PlanCase& c) {
    for (const auto& [rows, keys] : c.lengths) {
      seq_lens.push_back(keys);
      cu.push_back(cu.back() + rows);
    }
  }
};

// Unlike ids, so that no plan depends on them.
inline AttentionPlan plan_on_host(const PlanCase& c, const PlanLengths& lengths) {
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

inline PlanArgs args_of(const PlanCase& c, const PlanLengths& lengths) {
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
  args.counters_a_merge = 3;
  return args;
}

inline Planned plan_on_device(const Planner& planner, const PlanArgs& given,
                              const AttentionPlan& host, int max_tiles, uint32_t seed) {
  Planned made;
  made.items.resize(host.items.size());
  std::memset(made.items.data(), 0x77, made.items.size() * sizeof(ListedItem));
  made.merges.assign(host.merges.size(), {-7, -7, -7, -7, -7, -7, -7});
  made.counters.assign(host.merges.size() * given.counters_a_merge + 1, 7);
  std::memset(&made.counts, 0x77, sizeof made.counts);
  std::vector<int32_t> first_tiles(given.num_sequences, -7);
  std::vector<PlanTile> tiles(max_tiles, {-7, -7, -7, -7, -7, -7, -7, -7, -7, -7});
  PlanArgs args = given;
  args.max_tiles = max_tiles;
  args.items = made.items.data();
  args.merges = made.merges.data();
  args.counters = made.counters.data();
  args.tickets = &made.counters.back();
  args.counts = &made.counts;
  args.first_tiles = first_tiles.data();
  args.tiles = tiles.data();
  Options options;
  options.seed = seed;
  const auto allow = [&options](const void* data, size_t bytes) {
    options.global.allow(data, bytes);
  };
  const size_t n = given.num_sequences;
  allow(args.seq_lens, n * 4), allow(args.cu_seqlens_q, args.cu_seqlens_q ? (n + 1) * 4 : 0);
  allow(args.first_tiles, n * 4);
  allow(args.items, made.items.size() * sizeof(ListedItem));
  allow(args.merges, made.merges.size() * sizeof(MergeItem));
  allow(args.counters, made.counters.size() * 4), allow(args.counts, sizeof made.counts);
  allow(args.tiles, tiles.size() * sizeof(PlanTile));
  made.error = launch({1, PlannerShape::kThreads, PlannerShape::kSharedBytes}, options, [&] {
                 planner(args);
               }).error;
  return made;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

inline int num_tiles(const PlanCase& c, const PlanArgs& args) {
  int tiles = 0;
  for (const auto& [rows, keys] : c.lengths)
    tiles += ((c.one_row_each ? 1 : rows) + args.tile_rows - 1) / args.tile_rows;
  return tiles;
}

// By phase, else as they came: how the host sorts what it sends to a GPU. Adds where each begins.
inline std::vector<ListedItem> sorted_items(const AttentionPlan& plan, const PlanArgs& args,
                                            ItemRange (&ranges)[device::kNumPhases]) {
  std::vector<ListedItem> sorted;
  const auto phase_of = [&](const WorkItem& item) {
    const int64_t rows = int64_t{plan.sequences[item.sequence].q_len} * args.group;
    return rows <= args.decode_rows ? device::kDecode
           : rows >= args.wide_rows ? device::kWide
                                    : device::kNarrow;
  };
  for (const Phase phase : {device::kWide, device::kNarrow, device::kDecode}) {
    const auto begin = static_cast<int32_t>(sorted.size());
    for (const WorkItem& item : plan.items)
      if (phase_of(item) == phase) {
        Sequence sequence = plan.sequences[item.sequence];
        sequence.kv_row = item.sequence;  // of the caller's block table
        sorted.push_back({item, sequence});
      }
    const auto end = static_cast<int32_t>(sorted.size());
    ranges[phase] = begin < end ? ItemRange{begin, end} : ItemRange{0, 0};
  }
  return sorted;
}

// How the device's plan differs from the host's, or an empty string.
inline std::string compare_plans(const Planner& planner, const PlanCase& c, uint32_t seed) {
  const PlanLengths lengths(c);
  const AttentionPlan host = plan_on_host(c, lengths);
  const PlanArgs args = args_of(c, lengths);
  const Planned device = plan_on_device(planner, args, host, num_tiles(c, args), seed);
  if (!device.error.empty()) return device.error;
  if (device.counts.num_items != static_cast<int>(host.items.size())) return "number of items";
  if (device.counts.num_merges != static_cast<int>(host.merges.size())) return "number of merges";
  if (device.counts.num_partials != host.num_partials) return "number of partial results";
  ItemRange ranges[device::kNumPhases];
  if (!same(device.items, sorted_items(host, args, ranges))) return "items";
  if (std::memcmp(device.counts.ranges, ranges, sizeof ranges) != 0) return "ranges of items";
  if (!same(device.merges, host.merges)) return "merges";
  for (uint32_t count : device.counters)
    if (count != 0) return "counters";
  return "";
}

// Several phases, empty sequences, tiles that are cut and such that are not.
inline PlanCase mixed_plan_case() {
  PlanCase c{plan_model(32, 8), {132, 128}, 128};
  c.lengths = {{1, 9000}, {700, 700}, {0, 100}, {1, 1}, {32, 5000}, {8, 8192}, {5, 2}, {0, 0}};
  return c;
}

}  // namespace quire::emulator
