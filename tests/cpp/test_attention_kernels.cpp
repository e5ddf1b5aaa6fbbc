// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of every instruction set that this machine supports or models, called through
// their table.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_problem.h"
#include "cpu/isa.h"
#include "quire/backend.h"

using namespace quire;
using namespace quire::test;

#ifdef QUIRE_MODELLED_TIERS
namespace quire::cpu {  // see model/immintrin.h
extern const Kernels kAvx512Model, kAvx512Bf16Model, kAvx512AmxModel;
}  // namespace quire::cpu
#endif

namespace {

// Runs a list by a table of kernels, last item first: order must not matter.
auto with(const cpu::Kernels& kernels) {
  return [&kernels](const AttentionPlan& plan, const AttentionParams& params) {
    std::vector<float> partials(int64_t{plan.num_partials} * plan.partial_rows *
                                (2 + params.head_dim_v));
    const cpu::Run run{params, partials.data(), plan.partial_rows};
    for (auto item = plan.items.rbegin(); item != plan.items.rend(); ++item)
      kernels.attend(run, *item);
    for (const MergeItem& merge : plan.merges) kernels.merge(run, merge);
  };
}

// Those of this machine, and the models of those that it may not have.
std::vector<const cpu::Kernels*> kernels_under_test() {
  std::vector<const cpu::Kernels*> result;
  for (const cpu::Tier& tier : cpu::tiers())
    if (tier.is_supported) result.push_back(tier.kernels);
#ifdef QUIRE_MODELLED_TIERS
  const auto is_avx2 = [](const cpu::Kernels* kernels) {
    return kernels->isa == std::string("avx2");
  };
  if (std::any_of(result.begin(), result.end(), is_avx2))  // which the models are written in
    result.insert(result.end(),
                  {&cpu::kAvx512Model, &cpu::kAvx512Bf16Model, &cpu::kAvx512AmxModel});
#endif
  return result;
}

constexpr PlanTraits kWhole{1, 4096};  // one item a sequence and kv head
constexpr PlanTraits kSplit{64, 20};   // small tiles, chunks dealt out

void check_everywhere(const Case& c) {
  Problem problem(c);
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    CAPTURE(kernels->isa);
    const Result whole = problem.run(problem.plan(kWhole), with(*kernels));
    problem.check(whole, 2);
    const Result split = problem.run(problem.plan(kSplit), with(*kernels));
    CHECK(split == whole);  // bit by bit
  }
}

// The case for each element type, changed by `change`.
void check_types(const std::function<void(Case&)>& change) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Case c;
    c.desc.dtype = c.desc.kv_dtype = dtype;
    change(c);
    CAPTURE(name_of(dtype));
    check_everywhere(c);
  }
}

}  // namespace

TEST_CASE("ragged and paged, any page size and memory layout") {
  for (int block_size : {0, 1, 5, 16, 300})
    check_types([&](Case& c) {
      CAPTURE(block_size);
      c.desc.block_size = block_size;
      c.head_major = block_size == 5 || block_size == 300;
    });
}

TEST_CASE("any head dimension") {
  for (int dim : {1, 7, 40, 80, 128, 192, 256, 512})
    check_types([&](Case& c) {
      CAPTURE(dim);
      c.desc.head_dim = c.desc.head_dim_v = dim;
      c.desc.scale = 1 / std::sqrt(static_cast<float>(dim));
      c.batch = {{1, 37}, {11, 45}};
    });
  for (auto [dim, dim_v] : {std::pair{192, 128}, {24, 72}, {64, 3}})
    check_types([&](Case& c) {
      c.desc.head_dim = dim;
      c.desc.head_dim_v = dim_v;
      c.batch = {{1, 37}, {11, 45}};
    });
}

TEST_CASE("any number of query heads a kv head") {
  for (int group : {1, 3, 4, 8, 33})
    check_types([&](Case& c) {
      CAPTURE(group);
      c.desc.num_kv_heads = group == 33 ? 1 : 2;
      c.desc.num_heads = group * c.desc.num_kv_heads;
      c.batch = {{1, 37}, {4, 45}, {6, 540}};
    });
}

TEST_CASE("causal, windows, none") {
  for (auto [causal, left, right] : {std::tuple{false, -1, -1},
                                     {true, 16, -1},
                                     {false, 0, 0},
                                     {false, 100, 7},
                                     {false, -1, 3},
                                     {false, 520, -1}})
    check_types([&](Case& c) {
      CAPTURE(left);
      CAPTURE(right);
      c.desc.causal = causal;
      c.desc.window_left = left;
      c.desc.window_right = right;
    });
}

TEST_CASE("softcap, ALiBi, sinks, masks, and all at once") {
  check_types([](Case& c) { c.desc.softcap = 2; });
  check_types([](Case& c) { c.alibi = true; });
  check_types([](Case& c) { c.sinks = true; });
  check_types([](Case& c) { c.mask = Mask::kTree; });
  check_types([](Case& c) { c.mask = Mask::kFull, c.desc.causal = false; });
  check_types([](Case& c) {
    c.desc.softcap = 30, c.alibi = c.sinks = true, c.mask = Mask::kFull;
    c.desc.window_left = 300;
  });
}

TEST_CASE("what is not used may hold anything") {
  for (int q_len : {1, 40}) {
    Case c;
    c.batch = {{q_len, 45}, {q_len, 530}};
    Problem clean(c);
    for (float poison : {kInf, -kInf, 1e30f, 0.0f}) {
      c.poison = poison;
      Problem poisoned(c);
      for (const cpu::Kernels* kernels : kernels_under_test())
        CHECK(poisoned.run(poisoned.plan(kWhole), with(*kernels)) ==
              clean.run(clean.plan(kWhole), with(*kernels)));
    }
  }
}

TEST_CASE("any number of threads gives the same bits") {
  Case c;
  c.batch = {{1, 2100}, {40, 1200}, {1, 3}, {3, 700}};
  Problem problem(c);
  const auto backend = [](const AttentionPlan& plan, const AttentionParams& params) {
    cpu_backend()->run(plan, params);
  };
  const int before = num_threads();
  const Result expected = problem.run(problem.plan(kWhole), backend);
  problem.check(expected, 2);
  for (int threads : {1, 2, 5}) {
    set_num_threads(threads);
    for (int round = 0; round < 3; ++round) {
      CHECK(problem.run(problem.plan({threads, 64}), backend) == expected);
      CHECK(problem.run(problem.plan(kSplit), backend) == expected);
    }
  }
  set_num_threads(before);
}
