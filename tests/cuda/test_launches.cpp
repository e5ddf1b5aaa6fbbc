// SPDX-License-Identifier: Apache-2.0
// The CUDA backend over a driver that only pretends: grids, arguments and memory of launches of
// attention.
#include <doctest/doctest.h>

#include <cstring>
#include <map>
#include <set>

#include "backend_setup.h"

namespace quire::cuda {
namespace {

TEST_CASE("a mixed batch: kernels by sequence, grids, shared memory, arguments") {
  Setup s;
  Seen<device::AttentionArgs> seen(s.driver);
  const AttentionDesc desc = model();
  const Batch batch({{1, 3000}, {16, 40}, {300, 300}, {0, 9}, {8, 100}});
  const AttentionPlan plan = make_plan(s.backend(), desc, batch);
  AttentionParams params = params_of(desc, plan);
  s.backend().run(plan, params, {kGpu, kStream});

  REQUIRE(s.driver.launches.size() == 3);
  const char* expected[] = {"prefill_sm90_BFloat16_128_128_128_128_2_kFast",
                            "prefill_BFloat16_128_64_64_kFast", "decode_BFloat16_128_4_3_kFast"};
  const std::set<int> sequences[] = {{2}, {1}, {0, 4}};
  unsigned total = 0;
  for (int i = 0; i < 3; ++i) {
    const FakeLaunch& launch = s.driver.launches[i];
    const device::AttentionArgs& args = seen.all[i];
    CHECK(launch.kernel == expected[i]);
    CHECK(launch.stream == kStream);
    CHECK(launch.blocks == static_cast<unsigned>(args.num_items));
    CHECK(launch.threads == (i == 0 ? 384u : 128u));
    CHECK(s.driver.shared_limits[launch.kernel] == static_cast<int>(launch.shared_bytes));
    CHECK(launch.shared_bytes > 48u << 10);
    CHECK(args.is_aligned);
    CHECK(args.params.q == params.q);
    CHECK(args.params.scale == params.scale);
    CHECK(args.partial_rows == plan.partial_rows);
    total += launch.blocks;
    std::set<int> taken;
    int64_t cost = INT64_MAX;
    for (int item = 0; item < args.num_items; ++item) {
      const auto& [work, sequence] = args.items[item];
      taken.insert(work.sequence);
      const int64_t own = int64_t{work.kv_end - work.kv_begin} * (work.q_end - work.q_begin);
      if (work.partial < 0) cost = own;
      CHECK(sequence.seq_len == batch.seq_lens[work.sequence]);
      if (work.merge >= 0) {
        CHECK(args.counters[work.merge] == 0);
        CHECK(args.merges[work.merge].sequence == work.sequence);
      }
    }
    (void)cost;
    CHECK(taken == sequences[i]);
  }
  CHECK(total == plan.items.size());
  for (size_t i = 0; i < plan.block_ids.size(); ++i)
    CHECK(seen.all[0].params.block_table[i] == plan.block_ids[i]);
  // All that a launch points into is one piece of memory, of the size that is promised.
  const auto* begin = reinterpret_cast<const std::byte*>(seen.all[0].items);
  const auto* end = reinterpret_cast<const std::byte*>(
      seen.all[0].partial_stats + 2 * static_cast<size_t>(plan.num_partials) * plan.partial_rows);
  const size_t promised = s.backend().workspace_size(desc, plan);
  CHECK(static_cast<size_t>(end - begin) <= promised);
  CHECK(promised - static_cast<size_t>(end - begin) < 64);
}

TEST_CASE("head dim 256 on sm_90: every block of a launch has a place in the workspace") {
  Setup s;
  Seen<device::AttentionArgs> seen(s.driver);
  const AttentionDesc desc = model(256);
  const size_t a_block = 128 * 256 * 4 + 2 * 128 * 16;
  const auto places = [&](const Batch& batch) {
    const AttentionPlan plan = make_plan(s.backend(), desc, batch);
    const size_t first = seen.all.size();  // launch, whose items are the first of all
    s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
    const auto* begin = reinterpret_cast<const std::byte*>(seen.all[first].items);
    const auto* totals = reinterpret_cast<const std::byte*>(seen.all.back().totals);
    CHECK(reinterpret_cast<uintptr_t>(totals) % 16 == 0);
    return s.backend().workspace_size(desc, plan) - static_cast<size_t>(totals - begin);
  };
  CHECK(places(Batch({{1, 1000}, {20, 90}})) == 0);
  CHECK(places(Batch({{32, 32}, {1, 1000}})) == 2 * a_block);
  CHECK(s.driver.launches[s.driver.launches.size() - 2].blocks == 2);
  CHECK(places(Batch({{20000, 20000}})) == 132 * a_block);
  CHECK(s.driver.launches.back().blocks == 132);
  CHECK(contains(s.driver.launches.back().kernel, "prefill_sm90_BFloat16_256_256_"));
}

TEST_CASE("on sm_90 blocks ask for items: heads in sections of the L2 cache, the longest first") {
  Setup s;
  Seen<device::AttentionArgs> seen(s.driver);
  AttentionDesc desc = model();
  desc.num_heads = desc.num_kv_heads = 8;
  const Batch batch({{3000, 3000}, {20000, 20000}});
  const AttentionPlan plan = make_plan(s.backend(), desc, batch);
  s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
  REQUIRE(s.driver.launches.size() == 1);
  const FakeLaunch& launch = s.driver.launches[0];
  const device::AttentionArgs& args = seen.all[0];
  CHECK(launch.blocks == 132);
  CHECK(*args.tickets == 0);
  REQUIRE(args.num_items == static_cast<int>(plan.items.size()));
  // 20,000 keys of a head are 10.24 MB: three heads a section, then the 8 x 1.5 MB of the other
  // sequence fill up what is left.
  std::map<std::pair<int, int>, int> section_of;
  std::multiset<std::pair<int, int>> now, before;
  int section = 0;
  int64_t cost = INT64_MAX;
  for (int i = 0; i < args.num_items; ++i) {
    const WorkItem& item = args.items[i].work;
    const std::pair pair{item.sequence, item.kv_head};
    const int64_t own = int64_t{item.kv_end - item.kv_begin} * (item.q_end - item.q_begin);
    if (own > cost) ++section;
    cost = own;
    CHECK(section_of.try_emplace(pair, section).first->second == section);
    now.insert({item.q_begin, item.kv_head + 8 * item.sequence});
  }
  CHECK(section == 2);
  for (const WorkItem& item : plan.items)
    before.insert({item.q_begin, item.kv_head + 8 * item.sequence});
  CHECK(now == before);
  for (int head = 0; head < 8; ++head) CHECK(section_of[{1, head}] == head / 3);
}

TEST_CASE("on sm_90 a prompt's keys come by boxes where their layout allows it") {
  Setup s;
  Seen<device::BoxedAttentionArgs> seen(s.driver);
  const auto boxes = [&](int block_size, auto change) {
    AttentionDesc desc = model();
    desc.block_size = block_size;
    const AttentionPlan plan = make_plan(s.backend(), desc, Batch({{100, 300}}, block_size));
    AttentionParams params = params_of(desc, plan);
    change(params);
    s.backend().run(plan, params, {kGpu, nullptr});
    CHECK(contains(s.driver.launches.back().kernel, "prefill_sm90_BFloat16_128_128_128_"));
    return seen.all.back().box_rows;
  };
  const auto as_it_is = [](AttentionParams&) {};
  for (const auto& [block_size, rows] :
       {std::pair{16, 16}, {8, 8}, {24, 8}, {48, 16}, {64, 32}, {96, 32}, {4, 0}, {1, 0}, {20, 0}})
    CHECK(boxes(block_size, as_it_is) == rows);
  CHECK(boxes(16, [](AttentionParams& p) { p.k_stride_row += 4; }) == 0);
  // What the driver does not take is gathered: a stride that goes back, one too long.
  CHECK(boxes(16, [](AttentionParams& p) { p.v_stride_row = -p.v_stride_row; }) == 0);
  CHECK(boxes(16, [](AttentionParams& p) { p.k_stride_block = int64_t{1} << 40; }) == 0);
  emulator::TensorMapCode code;
  boxes(16, as_it_is);
  std::memcpy(&code, &seen.all.back().v, sizeof code);
  CHECK(code.base == seen.all.back().attention.params.v);
  CHECK(code.dims[0] == 128);
  CHECK(code.dims[1] == 16);
  CHECK(code.dims[2] == 2);
  CHECK(code.strides[0] == 2 * 2 * 128);
  CHECK(code.strides[1] == 2 * 128);
  CHECK(code.strides[2] == 2 * 2 * 128 * 16);
}

}  // namespace
}  // namespace quire::cuda
