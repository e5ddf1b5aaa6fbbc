// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of every instruction set that this machine supports or models, called through
// their table.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <string>
#include <thread>
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

// Runs a list by a table of kernels, last unit first: order must not matter.
auto with(const cpu::Kernels& kernels) {
  return [&kernels](const AttentionPlan& plan, const AttentionParams& params) {
    std::vector<float> partials(int64_t{plan.num_partials} * plan.partial_rows *
                                (2 + params.head_dim_v));
    const cpu::Run run{params, partials.data(), plan.partial_rows};
    for (auto unit = plan.units.rbegin(); unit != plan.units.rend(); ++unit)
      kernels.attend(run, {plan.items.data() + unit->begin, plan.items.data() + unit->end});
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
  for (int dim : {1, 7, 40, 80, 128, 192, 256, 512, 576})
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

TEST_CASE("a thread whose first rows are three, which are computed as four") {
  const auto run = [] {
    check_types([](Case& c) {
      c.desc.num_kv_heads = 8;
      c.desc.num_heads = 24;
      c.batch = {{1, 540}};
    });
  };
  std::thread(run).join();  // its scratch has not grown yet: the sanitizers see its end
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

TEST_CASE("quantised caches, scales of tokens or of all") {
  for (DType kv_dtype : {DType::kFloat8E4M3, DType::kFloat8E5M2, DType::kInt8})
    for (int block_size : {1, 5, 16})
      for (int dim : {7, 64, 80})
        for (bool token_scales : {false, true}) {
          Case c;
          c.desc.dtype = dim == 64 ? DType::kBFloat16 : DType::kFloat32;
          c.desc.kv_dtype = kv_dtype;
          c.desc.block_size = block_size;
          c.desc.head_dim = c.desc.head_dim_v = dim;
          c.token_scales = token_scales;
          c.head_major = block_size == 5;
          c.batch = {{1, 37}, {0, 9}, {3, 0}, {11, 45}, {2, 530}};
          CAPTURE(name_of(kv_dtype));
          CAPTURE(block_size);
          CAPTURE(dim);
          CAPTURE(token_scales);
          check_everywhere(c);
        }
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

// Three sequences of one group of blocks, four of another, of which two go on together; rows that
// decode, drafts and longer ones; one sequence alone. Lengths end in, at and after a chunk's end.
Case shared_case() {
  Case c;
  c.batch = {{1, 1300}, {1, 1030}, {3, 1536}, {1, 1100},  {10, 1400},
             {1, 1999}, {9, 1200}, {1, 700},  {40, 1100}, {1, 512}};
  const int odd = 1, even = 2, further = 3;
  c.prefixes = {{{odd, 1025}},
                {{odd, 1030}},
                {{odd, 1536}},
                {{even, 1024}},
                {{even, 1024}},
                {{even, 540}, {further, 1190}},
                {{even, 540}, {further, 1100}},
                {},
                {{even, 1024}},
                {{odd, 512}}};
  return c;
}

void check_sharing(const Case& c) {
  Problem problem(c);
  PlanTraits whole = kWhole, split = kSplit, some{3, 64, Sharing::kWherePays};
  whole.sharing = split.sharing = Sharing::kAlways;
  CHECK(problem.plan(kWhole).num_shared_items == 0);
  CHECK(problem.plan(whole).num_shared_items > 0);
  for (const cpu::Tier& tier : cpu::tiers()) {
    if (!tier.is_supported) continue;
    CAPTURE(tier.kernels->isa);
    const Result apart = problem.run(problem.plan(kWhole), with(*tier.kernels));
    problem.check(apart, 3);
    for (const PlanTraits& traits : {whole, split, some})
      CHECK(problem.run(problem.plan(traits), with(*tier.kernels)) == apart);  // bit by bit
  }
}

TEST_CASE("sharing the keys of a common prefix changes no bit") {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (int change = 0; change < 9; ++change) {
      Case c = shared_case();
      c.desc.dtype = c.desc.kv_dtype = dtype;
      if (change == 1) c.desc.block_size = 1;
      if (change == 2) c.desc.block_size = 60, c.head_major = true;  // no divisor of a chunk
      if (change == 3) c.desc.window_left = 1200;
      if (change == 4) c.desc.causal = false, c.mask = Mask::kFull, c.alibi = true;
      if (change == 5) c.desc.softcap = 5, c.sinks = true, c.mask = Mask::kTree;
      if (change == 6) c.desc.head_dim = 20, c.desc.head_dim_v = 43;
      if (change == 7) c.desc.num_heads = c.desc.num_kv_heads = 1;
      if (change == 8) c.desc.num_heads = 14;
      CAPTURE(name_of(dtype));
      CAPTURE(change);
      check_sharing(c);
    }
}

TEST_CASE("sharing the keys of a quantised prefix changes no bit") {
  for (DType kv_dtype : {DType::kFloat8E4M3, DType::kFloat8E5M2, DType::kInt8}) {
    Case c = shared_case();
    c.desc.kv_dtype = kv_dtype;
    c.token_scales = kv_dtype != DType::kFloat8E5M2;
    CAPTURE(name_of(kv_dtype));
    check_sharing(c);
  }
}

TEST_CASE("a host's threads may run the parts of a plan") {
  for (Sharing sharing : {Sharing::kNever, Sharing::kAlways}) {
    Problem problem(shared_case());
    const Result expected = problem.run(problem.plan(kWhole), with(cpu::kernels_in_use()));
    std::vector<std::byte> workspace;
    for (int nth : {1, 3, 8})
      for (bool in_order : {true, false}) {
        const AttentionPlan plan = problem.plan({nth, 20, sharing});
        const size_t size = cpu_backend()->workspace_size(problem.desc(), plan);
        if (workspace.size() < size) workspace.assign(size, std::byte{0});  // else as it was left
        const auto parts = [&](const AttentionPlan& p, const AttentionParams& params) {
          const auto part = [&] { cpu_backend()->run_part(p, params, workspace, nth); };
          std::vector<std::thread> threads;
          for (int i = 0; i < nth; ++i) in_order ? part() : void(threads.emplace_back(part));
          for (std::thread& thread : threads) thread.join();
        };
        for (int layer = 0; layer < 3; ++layer) CHECK(problem.run(plan, parts) == expected);
      }
  }
}

TEST_CASE("any number of threads gives the same bits") {
  Case c;
  c.batch = {{1, 2100}, {40, 1200}, {1, 3}, {3, 700}};
  c.prefixes = {{{1, 1500}}, {{1, 1000}}, {}, {{1, 700}}};
  Problem problem(c);
  const auto backend = [](const AttentionPlan& plan, const AttentionParams& params) {
    cpu_backend()->run(plan, params, {});
  };
  const int before = num_threads();
  const Result expected = problem.run(problem.plan(kWhole), backend);
  problem.check(expected, 2);
  for (int threads : {1, 2, 5}) {
    set_num_threads(threads);
    for (int round = 0; round < 3; ++round) {
      CHECK(problem.run(problem.plan({threads, 64}), backend) == expected);
      CHECK(problem.run(problem.plan(kSplit), backend) == expected);
      CHECK(problem.run(problem.plan({threads, 64, Sharing::kAlways}), backend) == expected);
    }
  }
  set_num_threads(before);
}
