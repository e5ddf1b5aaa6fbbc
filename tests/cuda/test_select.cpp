// SPDX-License-Identifier: Apache-2.0
// The CUDA backend over a driver that only pretends: which kernels serve a model, its sequences,
// options and layouts.
#include <doctest/doctest.h>

#include <set>
#include <string>

#include "backend_setup.h"

namespace quire::cuda {
namespace {

TEST_CASE("which GPU runs what, and the reason where none does") {
  Setup s;
  const auto explain = [&](const std::string& isa, const AttentionDesc& desc) {
    Dispatch dispatch;
    dispatch.candidates = s.backend().candidates(desc, {kGpu, isa, 100});
    return dispatch.explain();
  };
  CHECK(contains(explain("sm_90", model()),
                 "cuda.sm_90a.d128 (decode_BFloat16_128_4_3_kFast, "
                 "prefill_BFloat16_128_64_64_kFast"));
  CHECK(contains(explain("sm_90", model()), "prefill_sm90_BFloat16_128_128_128_128_2_kFast)"));
  CHECK(!contains(explain("sm_80", model()), "prefill_sm90"));
  AttentionDesc two_dims = model(192);
  CHECK(!contains(explain("sm_90", two_dims), "prefill_sm90_BFloat16_192"));
  two_dims.head_dim_v = 128;
  CHECK(contains(explain("sm_90", two_dims), "prefill_sm90_BFloat16_192_128_128_64_2_kFast)"));
  CHECK(!contains(explain("sm_100", model()), "prefill_sm90"));
  CHECK(contains(explain("sm_90", model()), "cuda.d96: head_dim 128: at most 96"));
  CHECK(contains(explain("sm_90", model(256)), "cuda.sm_90a.d256 (decode_BFloat16_256"));
  CHECK(contains(explain("sm_90", model(256)), "prefill_sm90_BFloat16_256_256_128_64_2_kFast)"));
  CHECK(contains(explain("sm_90", model(200)), "prefill_sm90_BFloat16_256_256_128_64_2_kFast)"));
  CHECK(!contains(explain("sm_100", model(256)), "prefill_sm90"));
  CHECK(contains(explain("sm_89", model()), "decode_BFloat16_128_4_2_kFast"));  // 99 KB a block
  CHECK(contains(explain("sm_121", model()), "cuda.sm_120.d128"));
  for (const char* unknown : {"sm_75", "sm_91", "sm_110"}) {
    const std::string text = explain(unknown, model());
    CHECK(!contains(text, "chosen"));
    CHECK(contains(text, std::string(unknown) + ": the kernels are compiled for sm_80, sm_90a, "));
  }
  AttentionDesc desc = model();
  desc.dtype = desc.kv_dtype = DType::kFloat32;
  CHECK(contains(explain("sm_90", desc), "dtype: float32 is not implemented"));
  desc.dtype = DType::kFloat16;
  CHECK(contains(explain("sm_90", desc), "kv_dtype: float32 KV under float16"));
  desc.kv_dtype = DType::kFloat8E4M3;
  CHECK(contains(explain("sm_86", desc), "decode_e4m3_Float16_"));
  desc.kv_dtype = DType::kInt8;
  CHECK(contains(explain("sm_90", desc), "kv_dtype: int8 KV under float16"));
  desc.kv_dtype = DType::kFloat8E4M3;
  desc.block_size = 0;
  CHECK(contains(explain("sm_90", desc), "paged caches only"));
  CHECK(!contains(explain("sm_90", model(257)), "chosen"));
  AttentionDesc codes = model();
  codes.dtype = codes.kv_dtype = DType::kFloat8E4M3;
  CHECK(contains(explain("sm_90", codes),
                 "cuda.sm_90a.d128 (prefill_sm90_e4m3_BFloat16_128_128_128_4_kFast): chosen"));
  CHECK(contains(explain("sm_90", codes), "dtype: none of head dim 256 for sm_90 takes queries"));
  CHECK(!contains(explain("sm_100", codes), "chosen"));
  CHECK(contains(explain("sm_90", codes), "cuda.d64: head_dim 128: at most 64"));
  codes.softcap = 3;
  codes.scale = -1;
  CHECK(contains(explain("sm_90", codes), "128_128_128_4_kFast): chosen"));
  codes.head_dim = codes.head_dim_v = 40;
  CHECK(contains(explain("sm_90", codes),
                 "cuda.sm_90a.d64 (prefill_sm90_e4m3_BFloat16_64_128_128_4_kFast): chosen"));
  AttentionDesc latent = model(576);
  latent.head_dim_v = 512;
  CHECK(contains(explain("sm_90", latent),
                 "cuda.sm_90a.d576 (mla_decode_BFloat16_576_16_16_4_kFast, "
                 "mla_decode_BFloat16_576_32_32_3_kFast, "
                 "mla_decode_sm90_BFloat16_576_64_32_4_kFast; v = k[..., :head_dim_v], the same "
                 "memory): chosen"));
  for (const char* other : {"sm_80", "sm_100", "sm_120"})
    CHECK(!contains(explain(other, latent), "mla_decode_sm90"));
  CHECK(contains(explain("sm_80", latent), "mla_decode_BFloat16_576_32_32_3_kFast"));
  CHECK(contains(explain("sm_120", latent), "mla_decode_BFloat16_576_32_32_2_kFast"));
  CHECK(contains(explain("sm_90", latent), "cuda.d256: head_dim 576: at most 256"));
  CHECK(contains(explain("sm_90", model()), "cuda.d576: head_dim 128: for more than 256 where v"));
  latent.head_dim_v = 513;
  CHECK(contains(explain("sm_90", latent),
                 "cuda.d576: head_dim_v 513: v is the first columns of k, fewer than head_dim 576 "
                 "and at most 512"));
  latent.kv_dtype = DType::kFloat8E4M3;
  CHECK(!contains(explain("sm_90", latent), "chosen"));
  for (const Capability& row : s.backend().capabilities())
    CHECK(row.available == (row.isa == "sm_90a"));
}

TEST_CASE("queries of codes: one kernel of each mode, whatever the sequence") {
  AttentionDesc desc = model();
  desc.dtype = desc.kv_dtype = DType::kFloat8E4M3;
  const KernelSet set = select(desc, "sm_90");
  for (const int64_t rows : {1, 32, 33, 128, 100000}) CHECK(set.phase_of(rows) == kNarrow);
  CHECK(set.max_rows() == 128);
  CHECK(set.kernels[kNarrow][0]->takes_tickets);
  AttentionDesc floats = model();
  floats.kv_dtype = DType::kFloat8E4M3;
  for (const auto& kernels : select(floats, "sm_90").kernels)
    for (const Kernel* kernel : kernels)
      CHECK((!kernel || kernel->dtype == ElementType::kBFloat16));
}

TEST_CASE("every row of the registry fits the GPUs it is for") {
  std::set<std::string> names;
  for (const Kernel& kernel : kKernels) {
    CHECK(names.insert(kernel.name).second);
    CHECK(kernel.threads % 32 == 0);
    CHECK(kernel.shared_bytes <= 227 << 10);
  }
  for (const char* isa : {"sm_80", "sm_86", "sm_90", "sm_100", "sm_120"})
    for (const ElementType dtype : {ElementType::kFloat16, ElementType::kBFloat16}) {
      for (const ElementType kv_dtype : {dtype, ElementType::kFloat8E4M3})
        for (const int head_dim : head_dims(kv_dtype))
          CHECK_MESSAGE(kernels_for(dtype, kv_dtype, head_dim, head_dim, isa).is_complete(), isa,
                        " ", head_dim);
    }
}

TEST_CASE("on sm_90 short prompts go to kernels that all parts have, long ones to its own") {
  int own = 0;
  for (const ElementType dtype : {ElementType::kFloat16, ElementType::kBFloat16})
    for (const int head_dim : head_dims(ElementType::kFloat16))
      for (const device::Mode mode : {device::Mode::kFast, device::Mode::kFull}) {
        const KernelSet set = kernels_for(dtype, dtype, head_dim, 1, "sm_90");
        const auto kernel = [&](Phase phase) { return set.kernels[phase][static_cast<int>(mode)]; };
        CHECK(kernel(kNarrow)->arch == nullptr);
        CHECK(kernel(kNarrow)->global_bytes == 0);
        CHECK(kernel(kDecode)->global_bytes == 0);
        own += set.has_wide() && kernel(kWide)->arch != nullptr;
      }
  CHECK(own == 2 * 5 * 2);
}

TEST_CASE("options and layouts that the fast kernels lack go to the full ones") {
  Setup s;
  const AttentionDesc desc = model();
  const AttentionPlan plan = make_plan(s.backend(), desc, Batch({{1, 50}}));
  const AttentionParams plain = params_of(desc, plan);
  const float one = 1;
  const uint8_t bits = 1;
  std::vector<AttentionParams> full(6, plain);
  full[0].softcap = 5;
  full[1].alibi_slopes = &one;
  full[2].mask = &bits;
  full[3].scale = -1;
  full[4].k_stride_row += 4;
  full[5].out = reinterpret_cast<void*>(0x200008);
  for (const AttentionParams& params : full) {
    s.backend().run(plan, params, {kGpu, nullptr});
    CHECK(s.driver.launches.back().kernel == "decode_BFloat16_128_4_3_kFull");
  }
  std::vector<AttentionParams> fast(3, plain);
  fast[1].sinks = &one;
  fast[2].window_left = 5;
  for (const AttentionParams& params : fast) {
    s.backend().run(plan, params, {kGpu, nullptr});
    CHECK(s.driver.launches.back().kernel == "decode_BFloat16_128_4_3_kFast");
  }
}

TEST_CASE("caches of codes have kernels of their own") {
  Setup s;
  Seen<device::AttentionArgs> seen(s.driver);
  AttentionDesc desc = model(96);
  desc.kv_dtype = DType::kFloat8E4M3;
  const AttentionPlan plan = make_plan(s.backend(), desc, Batch({{1, 3000}, {40, 90}}));
  AttentionParams params = params_of(desc, plan);
  s.backend().run(plan, params, {kGpu, kStream});
  REQUIRE(s.driver.launches.size() == 2);
  CHECK(s.driver.launches[0].kernel == "prefill_e4m3_BFloat16_128_64_64_kFast");
  CHECK(s.driver.launches[1].kernel == "decode_e4m3_BFloat16_128_4_4_kFast");
  params.k_stride_head = 104;  // in bytes no multiple of 16
  s.backend().run(plan, params, {kGpu, kStream});
  CHECK(s.driver.launches[3].kernel == "decode_e4m3_BFloat16_128_4_4_kFull");
  params.kv_dtype = ElementType::kBFloat16;
  CHECK_THROWS_AS(s.backend().run(plan, params, {kGpu, kStream}), InvalidArgument);
}

TEST_CASE("queries of codes: options and odd rows have a kernel, too") {
  Setup s;
  AttentionDesc desc = model();
  desc.dtype = desc.kv_dtype = DType::kFloat8E4M3;
  const AttentionPlan plan = make_plan(s.backend(), desc, Batch({{1, 3000}, {40, 90}}));
  const AttentionParams plain = params_of(desc, plan);
  const auto kernel_for = [&](auto change) {
    AttentionParams params = plain;
    change(params);
    s.driver.launches.clear();
    s.backend().run(plan, params, {kGpu, kStream});
    REQUIRE(s.driver.launches.size() == 1);
    return s.driver.launches[0].kernel;
  };
  const std::string stem = "prefill_sm90_e4m3_BFloat16_128_128_128_4_";
  const float slopes[64] = {};
  const uint8_t mask[1] = {};
  CHECK(kernel_for([](auto&) {}) == stem + "kFast");
  CHECK(kernel_for([](auto& p) { p.window_left = 5; }) == stem + "kFast");
  CHECK(kernel_for([](auto& p) { p.softcap = 3; }) == stem + "kFull");
  CHECK(kernel_for([](auto& p) { p.scale = -1; }) == stem + "kFull");
  CHECK(kernel_for([&](auto& p) { p.alibi_slopes = slopes; }) == stem + "kFull");
  CHECK(kernel_for([&](auto& p) { p.mask = mask; }) == stem + "kFull");
  CHECK(kernel_for([](auto& p) { p.q_stride_head += 8; }) == stem + "kFull");
}

}  // namespace
}  // namespace quire::cuda
