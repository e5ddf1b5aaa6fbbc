// SPDX-License-Identifier: Apache-2.0
// The PTX that nvcc made of the kernels, run on the emulator: the device side of the primitives
// and the compiler's own transformations, which the host build of the kernels does not see.
// Argument: a folder with the PTX of some lines of kernels.def, as CMake prepares it.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#include "emulator/attention_suite.h"
#include "emulator/plan_suite.h"
#include "emulator/ptx_opcodes.h"
#include "kernels/decode.h"
#include "kernels/mla_decode.h"
#include "kernels/prefill.h"
#include "kernels/sm90/mla_decode.h"
#include "kernels/sm90/prefill_e4m3.h"

namespace quire::emulator {
namespace {

using device::BFloat16;
using device::Float16;
using device::Mode;

std::string folder;

std::shared_ptr<PtxKernel> load(const std::string& file, const std::string& entry) {
  std::ifstream stream(folder + "/" + file);
  REQUIRE_MESSAGE(stream.good(), "no " << folder << "/" << file);
  std::stringstream source;
  source << stream.rdbuf();
  return std::make_shared<PtxKernel>(source.str(), entry);
}

// The geometry is that of the traits; the body is nvcc's.
template <class Traits>
AttentionKernel from_ptx(const std::string& file, const std::string& entry) {
  AttentionKernel kernel =
      bind<Traits>(static_cast<void (*)(const device::AttentionArgs&)>(nullptr));
  kernel.run = [program = load(file, entry)](const device::BoxedAttentionArgs& args) {
    program->run(&args);
  };
  return kernel;
}

AttentionCase base(int head_dim) {
  AttentionCase c;
  c.head_dim = c.head_dim_v = head_dim;
  return c;
}

TEST_CASE("prefill, every option") {
  using Traits = device::PrefillTraits<Float16, 64, 64, 64, Mode::kFull>;
  const auto kernel = from_ptx<Traits>("prefill.ptx", "prefill_Float16_64_64_64_kFull");
  check_options(kernel, base(64));
}

TEST_CASE("prefill, fast") {
  using Traits = device::PrefillTraits<BFloat16, 128, 64, 64, Mode::kFast>;
  const auto kernel = from_ptx<Traits>("prefill.ptx", "prefill_BFloat16_128_64_64_kFast");
  AttentionCase c = base(128);
  c.batch = kMixed;
  check_case(kernel, c, AsyncMode::kRandom);
  c.batch = {{3, 1100}, {20, 600}};
  c.parallelism = 6;
  check_case(kernel, c);
}

// Where the folder is that of an architecture that has it.
template <class Traits>
AttentionKernel sm90_from_ptx(const std::string& entry,
                              const std::string& file = "prefill_sm90.ptx") {
  AttentionKernel kernel =
      bind<Traits>(static_cast<void (*)(const device::BoxedAttentionArgs&)>(nullptr));
  kernel.run = [program = load(file, entry)](const device::BoxedAttentionArgs& args) {
    program->run(&args);
  };
  return kernel;
}

bool has_sm90() { return std::ifstream(folder + "/prefill_sm90.ptx").good(); }

TEST_CASE("prefill of sm_90a") {
  if (!has_sm90()) return;
  using Full = device::Sm90PrefillTraits<BFloat16, 64, 64, 128, 128, 3, Mode::kFull>;
  AttentionCase c = base(64);
  c.batch = kMixed;
  c.softcap = 3;
  c.window_left = 300;
  const auto full = sm90_from_ptx<Full>("prefill_sm90_BFloat16_64_64_128_128_3_kFull");
  check_case(full, c, AsyncMode::kRandom);
  c.cache = Cache::kOdd;
  check_case(full, c);
  using Fast = device::Sm90PrefillTraits<Float16, 128, 128, 128, 128, 2, Mode::kFast>;
  const auto fast = sm90_from_ptx<Fast>("prefill_sm90_Float16_128_128_128_128_2_kFast");
  c = base(128);
  c.batch = {{3, 1100}, {70, 600}};
  c.parallelism = 6;
  for (const int block_size : {16, 3}) {
    c.block_size = block_size;
    check_case(fast, c, AsyncMode::kRandom, static_cast<uint32_t>(block_size));
  }
  c.num_heads = c.num_kv_heads = 1;
  c.batch = {{5, 1100}};
  check_bits(fast, c);
}

TEST_CASE("prefill of sm_90a, head dim 256") {
  if (!has_sm90()) return;
  using Fast = device::Sm90PrefillTraits<Float16, 256, 256, 128, 64, 2, Mode::kFast>;
  const auto fast = sm90_from_ptx<Fast>("prefill_sm90_Float16_256_256_128_64_2_kFast");
  AttentionCase c = base(256);
  c.batch = {{3, 1100}, {70, 100}};
  for (const int block_size : {16, 3}) {
    c.block_size = block_size;
    check_case(fast, c, AsyncMode::kRandom, static_cast<uint32_t>(block_size));
    c.parallelism = 6;
  }
}

TEST_CASE("prefill of sm_90a where all are codes of e4m3") {
  if (!has_sm90()) return;
  using Traits = device::Sm90E4m3Traits<BFloat16, 128, 128, 128, 4, Mode::kFast>;
  const auto kernel = sm90_from_ptx<Traits>("prefill_sm90_e4m3_BFloat16_128_128_128_4_kFast",
                                            "prefill_sm90_e4m3.ptx");
  AttentionCase c = base(128);
  c.code_queries = true;
  c.batch = {{3, 1100}, {70, 600}};
  c.parallelism = 6;
  for (const Codes codes : {Codes::kHead, Codes::kToken})
    for (const int block_size : {16, 3}) {
      c.codes = codes;
      c.block_size = block_size;
      check_case(kernel, c, AsyncMode::kRandom, static_cast<uint32_t>(block_size));
    }
  c.num_heads = c.num_kv_heads = 1;
  c.batch = {{5, 1100}};
  check_bits(kernel, c);
}

TEST_CASE("prefill of sm_90a where all are codes of e4m3, every option") {
  if (!has_sm90()) return;
  using Traits = device::Sm90E4m3Traits<BFloat16, 64, 128, 128, 4, Mode::kFull>;
  const auto kernel = sm90_from_ptx<Traits>("prefill_sm90_e4m3_BFloat16_64_128_128_4_kFull",
                                            "prefill_sm90_e4m3.ptx");
  AttentionCase c = base(64);
  c.code_queries = true;
  c.batch = {{3, 600}, {19, 45}};
  c.softcap = 3;
  c.alibi = true;
  c.mask = c.mask_is_tree = true;
  for (const Codes codes : {Codes::kHead, Codes::kToken})
    for (const Cache cache : {Cache::kHnd, Cache::kOdd}) {
      c.codes = codes;
      c.cache = cache;
      check_case(kernel, c, AsyncMode::kRandom);
    }
}

TEST_CASE("decode") {
  using Traits = device::DecodeTraits<Float16, 128, 4, 3, Mode::kFast>;
  const auto kernel = from_ptx<Traits>("decode.ptx", "decode_Float16_128_4_3_kFast");
  AttentionCase c = base(128);
  c.batch = kMixed;
  check_case(kernel, c, AsyncMode::kRandom);
  c.batch = {{1, 1100}, {2, 600}};
  c.parallelism = 6;
  check_case(kernel, c);
}

TEST_CASE("latent caches") {
  AttentionCase c = base(576);
  c.head_dim_v = 512;
  c.is_latent = true;
  c.num_heads = 20, c.num_kv_heads = 1;
  c.batch = {{3, 21}, {1, 1}, {1, 600}};
  using Fast = device::MlaTraits<BFloat16, 576, 32, 32, 3, Mode::kFast>;
  const auto fast = from_ptx<Fast>("mla_decode.ptx", "mla_decode_BFloat16_576_32_32_3_kFast");
  check_case(fast, c, AsyncMode::kRandom);
  c.parallelism = 6;
  check_case(fast, c);
  c.softcap = 3;
  c.window_left = 40;
  c.mask = c.mask_is_tree = true;
  using Full = device::MlaTraits<Float16, 576, 16, 16, 4, Mode::kFull>;
  const auto full = from_ptx<Full>("mla_decode.ptx", "mla_decode_Float16_576_16_16_4_kFull");
  for (Cache cache : {Cache::kNhd, Cache::kOdd}) {
    c.cache = cache;
    check_case(full, c, AsyncMode::kRandom);
  }
  c = base(576);
  c.head_dim_v = 512;
  c.is_latent = true;
  c.num_heads = c.num_kv_heads = 1;
  c.batch = {{5, 1100}};
  check_bits(fast, c);
}

TEST_CASE("latent caches on sm_90a") {
  if (!has_sm90()) return;
  using Fast = device::Sm90MlaTraits<BFloat16, 576, 64, 32, 4, Mode::kFast>;
  const auto fast =
      sm90_from_ptx<Fast>("mla_decode_sm90_BFloat16_576_64_32_4_kFast", "mla_decode_sm90.ptx");
  AttentionCase c = base(576);
  c.head_dim_v = 512;
  c.is_latent = true;
  c.num_heads = 80, c.num_kv_heads = 1;
  c.batch = {{1, 600}, {2, 45}, {1, 0}};
  for (const int block_size : {16, 3}) {
    c.block_size = block_size;
    check_case(fast, c, AsyncMode::kRandom, static_cast<uint32_t>(block_size));
    c.parallelism = 6;
  }
}

TEST_CASE("e4m3 codes") {
  using Decode = device::DecodeTraits<BFloat16, 128, 4, 4, Mode::kFast, device::Float8E4M3>;
  AttentionCase c = base(128);
  c.batch = {{1, 1100}, {2, 60}};
  c.parallelism = 6;
  c.codes = Codes::kToken;
  check_case(from_ptx<Decode>("e4m3.ptx", "decode_e4m3_BFloat16_128_4_4_kFast"), c);
  using Prefill = device::PrefillTraits<Float16, 64, 64, 64, Mode::kFull, device::Float8E4M3>;
  const auto prefill = from_ptx<Prefill>("e4m3.ptx", "prefill_e4m3_Float16_64_64_64_kFull");
  for (Codes codes : {Codes::kHead, Codes::kToken}) {
    c = base(64);
    c.batch = {{19, 45}, {1, 1}, {3, 530}};
    c.codes = codes;
    c.softcap = 3;
    c.window_left = 40;
    check_case(prefill, c, AsyncMode::kRandom);
  }
}

TEST_CASE("plan") {
  const Planner planner = [program = load("plan.ptx", "plan_512")](const PlanArgs& args) {
    program->run(&args);
  };
  PlanCase c = mixed_plan_case();
  CHECK(compare_plans(planner, c, 1) == "");
  c.desc.causal = false;
  c.desc.window_left = 50, c.desc.window_right = 700;
  CHECK(compare_plans(planner, c, 2) == "");
  c.lengths.assign(600, {1, 8192});
  c.lengths.push_back({1, 65536});
  c.one_row_each = true;
  CHECK(compare_plans(planner, c, 3) == "");
}

TEST_CASE("bits do not depend on how the work is cut, after nvcc either") {
  AttentionCase c = base(128);
  c.num_heads = c.num_kv_heads = 1;
  c.batch = {{5, 1100}};
  using Prefill = device::PrefillTraits<BFloat16, 128, 64, 64, Mode::kFast>;
  check_bits(from_ptx<Prefill>("prefill.ptx", "prefill_BFloat16_128_64_64_kFast"), c);
  using Decode = device::DecodeTraits<Float16, 128, 4, 3, Mode::kFast>;
  check_bits(from_ptx<Decode>("decode.ptx", "decode_Float16_128_4_3_kFast"), c);
}

}  // namespace
}  // namespace quire::emulator

int main(int argc, char** argv) {
  if (argc > 1) quire::emulator::folder = argv[1];
  doctest::Context context(argc - 1, argv + 1);
  return context.run();
}
