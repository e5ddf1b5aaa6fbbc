// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <limits>
#include <random>

#include "emulator/plan_suite.h"
#include "kernels/plan.h"

namespace quire::emulator {
namespace {

const Planner kPlanner = device::plan<PlannerShape>;

TEST_CASE("the lists of decode batches are those of the host") {
  PlanCase c{plan_model(64, 8), {132, 128}};
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
  CHECK(compare_plans(kPlanner, c, 1) == "");
}

TEST_CASE("the lists of mixed batches are those of the host") {
  PlanCase c = mixed_plan_case();
  SUBCASE("causal") {}
  SUBCASE("not causal") { c.desc.causal = false; }
  SUBCASE("window") { c.desc.window_left = 600; }
  SUBCASE("window on both sides") {
    c.desc.causal = false;
    c.desc.window_left = 50, c.desc.window_right = 700;
  }
  SUBCASE("more heads than rows of an item") { c.desc.num_kv_heads = 1, c.cut.max_rows = 16; }
  SUBCASE("no wide tile") { c.wide_rows = std::numeric_limits<int64_t>::max(); }
  CHECK(compare_plans(kPlanner, c, 2) == "");
}

TEST_CASE("random batches") {
  std::mt19937 random(17);
  const auto draw = [&random](int most) { return static_cast<int>(random() % (most + 1u)); };
  for (int round = 0; round < 60; ++round) {
    const int kv_heads = 1 << draw(3);
    PlanCase c{plan_model(kv_heads * (1 + draw(9)), kv_heads),
               {1 + draw(draw(1) ? 200 : 3), 16 << draw(3)}};
    c.wide_rows = draw(1) ? 64 << draw(3) : std::numeric_limits<int64_t>::max();
    c.desc.causal = draw(3) > 0;
    if (draw(2) == 0) c.desc.window_left = draw(3000);
    if (draw(2) == 0) c.desc.window_right = draw(600);
    const int most_keys = draw(1) ? 3000 : 40'000, most_rows = draw(1) ? 4 : 300;
    for (int i = draw(40); i > 0; --i) c.lengths.push_back({draw(most_rows), draw(most_keys)});
    c.one_row_each = draw(3) == 0;
    CAPTURE(round);
    CHECK(compare_plans(kPlanner, c, round) == "");
  }
}

// Whatever the lengths say, nothing is written but the lists, and their rows and keys are there.
TEST_CASE("lengths that make no sense") {
  PlanCase c{plan_model(8, 2), {20, 64}};
  c.lengths.assign(6, {1, 1});
  PlanLengths lengths(c);
  PlanArgs args = args_of(c, lengths);
  args.max_total_q = 100;
  args.max_seq_len = 2000;
  lengths.seq_lens = {-5, 3000, std::numeric_limits<int32_t>::max(), 7, 0, INT32_MIN};
  lengths.cu = {5, 400, -3, 90, 0, 100, 60};
  const int max_tiles = 12;
  AttentionPlan room;  // of which the planner is to use no more
  room.items.resize(2 * (max_tiles + 80));
  room.merges.resize(room.items.size());
  const Planned made = plan_on_device(kPlanner, args, room, max_tiles, 3);
  REQUIRE(made.error == "");
  CHECK(made.counts.num_items > 0);
  for (int i = 0; i < made.counts.num_items; ++i) {
    const auto& [work, s] = made.items[i];
    CHECK(s.q_begin >= 0);
    CHECK(s.q_len > 0);
    CHECK(s.q_begin + s.q_len <= 100);
    CHECK(s.seq_len >= 0);
    CHECK(s.seq_len <= 2000);
    CHECK(s.kv_row == work.sequence);
    CHECK(work.q_end <= s.q_len);
    CHECK(work.kv_end <= s.seq_len);
  }
}

}  // namespace
}  // namespace quire::emulator
