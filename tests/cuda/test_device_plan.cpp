// SPDX-License-Identifier: Apache-2.0
// Plans that the device makes: what is launched for them, and room for whatever the lengths are.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>

#include "backend_setup.h"
#include "host/device_plan.h"

namespace quire::cuda {
namespace {

// Lengths "on the device" that nobody on the host reads.
const auto* const kLengths = reinterpret_cast<const int32_t*>(0x10000);
const auto* const kOffsets = reinterpret_cast<const int32_t*>(0x20000);
const auto* const kTable = reinterpret_cast<const int32_t*>(0x30000);

AttentionBatch batch_on_device(int sequences, int blocks, bool ragged) {
  AttentionBatch batch;
  batch.batch_size = sequences;
  batch.seq_lens = kLengths;
  batch.cu_seqlens_q = ragged ? kOffsets : nullptr;
  batch.block_table = kTable;
  batch.block_table_stride = blocks + 5;
  batch.max_blocks = blocks;
  return batch;
}

// The arguments of all launches, copied while they were alive.
struct Launched {
  std::vector<device::PlanArgs> plans;
  std::vector<std::pair<FakeLaunch, device::AttentionArgs>> runs;

  explicit Launched(FakeDriver& driver) {
    driver.on_launch = [this](const FakeLaunch& launch) {
      if (launch.kernel == "plan_512")
        plans.push_back(*static_cast<const device::PlanArgs*>(launch.args));
      else
        runs.push_back({launch, *static_cast<const device::AttentionArgs*>(launch.args)});
    };
  }
};

AttentionPlan plan_on_device(const Backend& backend, const AttentionDesc& desc,
                             const AttentionBatch& batch, int max_total_q,
                             Handle stream = kStream) {
  AttentionPlan plan;
  plan.total_q = max_total_q;
  plan.made_on_device = true;
  plan.on_device = backend.plan_on_device(desc, batch, max_total_q, {kGpu, stream});
  return plan;
}

TEST_CASE("a decode plan: one planner, one kernel on a fixed grid, the caller's block table") {
  Setup s;
  Launched launched(s.driver);
  const AttentionDesc desc = model();
  const AttentionPlan plan = plan_on_device(s.backend(), desc, batch_on_device(64, 512, false), 64);
  REQUIRE(launched.plans.size() == 1);
  const device::PlanArgs& args = launched.plans[0];
  CHECK(args.seq_lens == kLengths);
  CHECK(args.cu_seqlens_q == nullptr);
  CHECK(args.num_sequences == 64);
  CHECK(args.max_seq_len == 8192);
  CHECK(args.group == 4);
  CHECK(args.window_right == 0);
  CHECK(args.parallelism == 132);
  CHECK(args.tile_rows == 32);
  CHECK(s.driver.launches[0].blocks == 1);
  CHECK(s.driver.launches[0].stream == kStream);

  for (int layer = 0; layer < 2; ++layer)
    s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
  REQUIRE(launched.runs.size() == 2);
  const auto& [launch, run] = launched.runs[1];
  CHECK(contains(launch.kernel, "decode_BFloat16_128_"));
  CHECK(launch.blocks == 2 * 132);
  CHECK(run.items == args.items);
  CHECK(run.range == args.counts->ranges + kDecode);
  CHECK(run.merges == args.merges);
  CHECK(run.counters == args.counters);
  CHECK(run.params.block_table == kTable);
  CHECK(run.params.block_table_stride == 517);
  CHECK(s.driver.count("cuMemcpyHtoDAsync") == 0);
  CHECK(s.driver.count("cuMemAlloc") == 1);
  CHECK(s.backend().workspace_size(desc, plan) > 64u << 20);
  CHECK(s.driver.count("cuCtxPushCurrent") == s.driver.count("cuCtxPopCurrent"));
}

TEST_CASE("a ragged plan launches what its rows may need, and nothing more") {
  Setup s;
  Launched launched(s.driver);
  const auto phases = [&](int num_heads, int max_total_q) {
    AttentionDesc desc = model();
    desc.num_heads = num_heads;
    const AttentionPlan plan =
        plan_on_device(s.backend(), desc, batch_on_device(3, 8, true), max_total_q);
    launched.runs.clear();
    s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
    std::string names;
    for (const auto& [launch, args] : launched.runs) {
      names += launch.kernel.rfind("decode", 0) == 0         ? "decode "
               : launch.kernel.rfind("prefill_sm90", 0) == 0 ? "wide "
                                                             : "narrow ";
      CHECK(launch.blocks >= 1);
      CHECK(launch.blocks <= 2 * 132);
    }
    return names;
  };
  CHECK(phases(8, 8) == "decode ");
  CHECK(phases(8, 9) == "narrow decode ");
  CHECK(phases(8, 31) == "narrow decode ");
  CHECK(phases(8, 32) == "wide narrow decode ");
  CHECK(phases(80, 2) == "narrow ");       // 40 heads a kv head: never decode
  CHECK(phases(80, 4) == "wide narrow ");  // 40 and 160 rows
  CHECK(phases(8, 0) == "");
}

TEST_CASE("head dim 256 on sm_90: every block of a fixed grid has a place in the workspace") {
  Setup s;
  Launched launched(s.driver);
  const AttentionDesc desc = model(256);
  const auto bytes = [&](int max_total_q) {
    const AttentionPlan plan =
        plan_on_device(s.backend(), desc, batch_on_device(3, 8, true), max_total_q);
    launched.runs.clear();
    s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
    return s.backend().workspace_size(desc, plan);
  };
  CHECK(bytes(31) < 60u << 20);
  CHECK(launched.runs[0].second.totals == nullptr);
  const size_t whole = bytes(3000);
  const auto& [launch, args] = launched.runs[0];
  CHECK(contains(launch.kernel, "prefill_sm90_BFloat16_256_256_"));
  CHECK(launch.blocks == 132);
  const auto* begin = reinterpret_cast<const std::byte*>(args.range);
  const auto* totals = reinterpret_cast<const std::byte*>(args.totals);
  CHECK(whole - static_cast<size_t>(totals - begin) == 132 * (128 * 256 * 4 + 2 * 128 * 16));
}

TEST_CASE("a plan of the device stays on its stream and in its capture") {
  Setup s;
  const AttentionDesc desc = model();
  const auto run = [&](const AttentionPlan& plan, Handle stream) {
    s.backend().run(plan, params_of(desc, plan), {kGpu, stream});
  };
  const AttentionBatch batch = batch_on_device(4, 8, false);
  const Handle other = reinterpret_cast<Handle>(0x99);
  {
    const AttentionPlan plan = plan_on_device(s.backend(), desc, batch, 4);
    run(plan, kStream);
    CHECK_THROWS_WITH_AS(run(plan, other),
                         "attention: stream: expected the one on which the plan was made",
                         InvalidArgument);
    s.driver.capture = 4;
    run(plan, kStream);  // the lists are there
    s.driver.capture = 0;
  }
  {
    s.driver.capture = 5;
    const AttentionPlan plan = plan_on_device(s.backend(), desc, batch, 4);
    CHECK(s.driver.count("cuMemAlloc") == 1);  // that of the plan before, which is done
    run(plan, kStream);
    for (const uint64_t capture : {0, 6}) {
      s.driver.capture = capture;
      CHECK_THROWS_AS(run(plan, kStream), InvalidArgument);
    }
    s.driver.capture = 0;
  }
  // What a graph reads is never given out again.
  const AttentionPlan next = plan_on_device(s.backend(), desc, batch, 4);
  CHECK(s.driver.count("cuMemAlloc") == 2);
}

TEST_CASE("batches too large to plan on the device are refused, and calls that fail named") {
  Setup s;
  const AttentionDesc desc = model();
  const auto error_of = [&](const AttentionBatch& batch, int max_total_q) -> std::string {
    try {
      plan_on_device(s.backend(), desc, batch, max_total_q);
    } catch (const std::exception& error) {
      return error.what();
    }
    return "";
  };
  CHECK(error_of(batch_on_device(1, 8, true), 1 << 20)
            .find("plan: max_total_q: expected a batch of "
                  "at most 8192 runs of rows") == 0);
  CHECK(error_of(batch_on_device(7000, 1 << 27, false), 7000)
            .find("plan: block_table: expected fewer blocks to plan for") == 0);
  CHECK(s.driver.count("cuMemAlloc") == 0);
  for (const char* symbol : {"cuMemAlloc", "cuLaunchKernel"}) {
    s.driver.failing = {{symbol, 2}};
    CHECK(contains(error_of(batch_on_device(1, 8, false), 1), symbol));
  }
  s.driver.failing = {};
  CHECK(error_of(batch_on_device(1, 8, false), 1) == "");
  AttentionDesc wrong = model(64);
  const AttentionPlan plan = plan_on_device(s.backend(), wrong, batch_on_device(1, 8, false), 1);
  CHECK_THROWS_AS(s.backend().run(plan, params_of(desc, plan), {kGpu, kStream}), InvalidArgument);
}

TEST_CASE("no batch takes more than its bounds") {
  std::mt19937 random(5);
  const auto draw = [&random](int most) { return static_cast<int>(random() % (most + 1u)); };
  double fullest = 0;
  for (int round = 0; round < 3000; ++round) {
    const int kv_heads = 1 << draw(3);
    AttentionDesc desc = model();
    desc.num_kv_heads = kv_heads;
    desc.num_heads = kv_heads * (1 + draw(9));
    desc.block_size = 1 << 20;
    desc.causal = draw(1) == 0;
    if (draw(2) == 0) desc.window_left = draw(3000);
    const PlanTraits traits{1 + draw(round % 2 ? 200 : 3), 16 << draw(3)};
    const int most_keys = round % 3 == 0 ? 600 : 30'000, most_rows = draw(2) ? 2 : 200;
    const int typical = draw(most_keys);
    std::vector<std::pair<int, int>> lengths;
    int64_t rows = 0, keys = 0;
    for (int i = draw(round % 5 ? 8 : 80); i > 0; --i) {
      lengths.push_back({draw(most_rows), draw(3) ? typical : draw(most_keys)});
      rows += lengths.back().first;
      keys = std::max<int64_t>(keys, lengths.back().second);
    }
    const Batch batch(lengths, desc.block_size);
    const AttentionPlan made = plan(desc, batch.view, traits);
    const PlanBounds bounds(desc, traits.max_rows, traits.parallelism,
                            static_cast<int64_t>(lengths.size()), rows, keys);
    std::map<std::pair<int, int>, int> tiles;
    for (const WorkItem& item : made.items) ++tiles[{item.sequence, item.q_begin}];
    CAPTURE(round);
    CHECK(static_cast<int64_t>(tiles.size()) <= bounds.tiles);
    CHECK(static_cast<int64_t>(made.items.size()) <= bounds.pieces * kv_heads);
    CHECK(static_cast<int64_t>(made.merges.size()) <= bounds.merges);
    CHECK(made.num_partials <= bounds.partials);
    CHECK(made.partial_rows <= bounds.partial_rows);
    if (bounds.merges > 0)
      fullest = std::max(fullest, static_cast<double>(made.merges.size()) / bounds.merges);
  }
  CHECK(fullest > 0.9);  // the bounds are not far above what there may be
}

TEST_CASE("latent caches on sm_90: rows of many heads have one kernel on a fixed grid") {
  Setup s;
  Launched launched(s.driver);
  AttentionDesc desc = model(576);
  desc.head_dim_v = 512;
  desc.num_heads = 128, desc.num_kv_heads = 1;
  const AttentionPlan plan = plan_on_device(s.backend(), desc, batch_on_device(64, 512, false), 64);
  REQUIRE(launched.plans.size() == 1);
  CHECK(launched.plans[0].wide_rows == 64);
  CHECK(launched.plans[0].tile_rows == 1);
  s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
  REQUIRE(launched.runs.size() == 1);
  const auto& [launch, args] = launched.runs[0];
  CHECK(launch.kernel == "mla_decode_sm90_BFloat16_576_64_32_4_kFast");
  CHECK(launch.blocks == 132);
  CHECK(args.item_rows == 128);
  CHECK(args.range == launched.plans[0].counts->ranges + kWide);
  CHECK(args.totals != nullptr);
}

}  // namespace
}  // namespace quire::cuda
