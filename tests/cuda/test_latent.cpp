// SPDX-License-Identifier: Apache-2.0
// Attention over latent caches on a GPU that only pretends: which kernels are launched, with what.
#include <doctest/doctest.h>

#include "backend_setup.h"

namespace quire::cuda {
namespace {

TEST_CASE("latent caches: a block a tile of rows, and no V of its own") {
  Setup s;
  Seen<device::AttentionArgs> seen(s.driver);
  AttentionDesc desc = model(576);
  desc.head_dim_v = 512;
  desc.num_heads = 40, desc.num_kv_heads = 1;
  const Batch batch({{1, 9000}, {1, 40}, {0, 9}});
  const AttentionPlan plan = make_plan(s.backend(), desc, batch);
  AttentionParams params = params_of(desc, plan);
  s.backend().run(plan, params, {kGpu, kStream});
  REQUIRE(s.driver.launches.size() == 1);
  CHECK(s.driver.launches[0].kernel == "mla_decode_BFloat16_576_32_32_3_kFast");
  CHECK(s.driver.launches[0].threads == 256);
  CHECK(seen.all[0].item_rows == 40);
  CHECK(s.driver.launches[0].blocks == 2 * static_cast<unsigned>(seen.all[0].num_items));

  // One head: decode rows, a block each.
  desc.num_heads = 1;
  const AttentionPlan one = make_plan(s.backend(), desc, batch);
  params = params_of(desc, one);
  s.backend().run(one, params, {kGpu, kStream});
  REQUIRE(s.driver.launches.size() == 2);
  CHECK(s.driver.launches[1].kernel == "mla_decode_BFloat16_576_16_16_4_kFast");
  CHECK(s.driver.launches[1].blocks == static_cast<unsigned>(seen.all[1].num_items));

  const auto refused = [&] {
    CHECK_THROWS_WITH_AS(s.backend().run(one, params, {kGpu, kStream}),
                         doctest::Contains("v = k[..., :512]; got other memory"), Unsupported);
    CHECK(s.driver.launches.size() == 2);
  };
  params.v = reinterpret_cast<void*>(0x300000);
  refused();
  params.v = params.k;
  params.v_stride_row = 512;
  refused();
}

TEST_CASE("latent caches on sm_90: from 64 rows of a sequence on products of warpgroups") {
  Setup s;
  Seen<device::BoxedAttentionArgs> seen(s.driver);
  AttentionDesc desc = model(576);
  desc.head_dim_v = 512;
  desc.num_heads = 128, desc.num_kv_heads = 1;
  const auto run = [&](const Batch& batch) {
    const AttentionPlan plan = make_plan(s.backend(), desc, batch);
    AttentionParams params = params_of(desc, plan);
    s.backend().run(plan, params, {kGpu, kStream});
    return s.backend().workspace_size(desc, plan);
  };
  run(Batch({{1, 40}}));
  REQUIRE(s.driver.launches.size() == 1);
  CHECK(s.driver.launches[0].kernel == "mla_decode_sm90_BFloat16_576_64_32_4_kFast");
  CHECK(s.driver.launches[0].threads == 512);
  CHECK(s.driver.launches[0].blocks == 2);  // tiles of rows
  CHECK(seen.all[0].attention.item_rows == 128);
  CHECK(seen.all[0].attention.tickets != nullptr);
  CHECK(reinterpret_cast<uintptr_t>(seen.all[0].attention.totals) % 16 == 0);
  // As many places in the workspace as blocks, and those at most as many as multiprocessors.
  constexpr size_t kPlace = 64 * 512 * 4;
  const size_t one = run(Batch({{1, 40}})), two = run(Batch({{1, 40}, {1, 40}}));
  CHECK((two - one) / kPlace == 2);
  CHECK(run(Batch({{300, 300}})) < 133 * kPlace);
  CHECK(s.driver.launches.back().blocks == 132);

  // By a sequence's rows, whatever is beside it.
  desc.num_heads = 16;
  run(Batch({{1, 90}, {3, 90}, {4, 90}, {70, 90}}));
  REQUIRE(s.driver.launches.size() == 7);
  CHECK(s.driver.launches[4].kernel == "mla_decode_sm90_BFloat16_576_64_32_4_kFast");
  CHECK(seen.all[4].attention.num_items > 17);
  CHECK(s.driver.launches[5].kernel == "mla_decode_BFloat16_576_32_32_3_kFast");
  CHECK(seen.all[5].attention.num_items == 1);
  CHECK(s.driver.launches[6].kernel == "mla_decode_BFloat16_576_16_16_4_kFast");
  CHECK(seen.all[6].attention.num_items == 1);
}

}  // namespace
}  // namespace quire::cuda
