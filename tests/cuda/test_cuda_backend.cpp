// SPDX-License-Identifier: Apache-2.0
// The CUDA backend over a driver that only pretends: what is launched, with which arguments, and
// what is never done.
#include <doctest/doctest.h>

#include <map>
#include <set>
#include <thread>

#include "backend_setup.h"

namespace quire::cuda {
namespace {

// ---- Starting -----------------------------------------------------------------------------------

TEST_CASE("whatever keeps CUDA from being used is said in one sentence") {
  FakeDriver driver;
  const Driver table = FakeDriver::table();
  const auto state = [&] {
    const Made made = make_backend(table, all_images());
    CHECK((made.backend != nullptr) == contains(made.state, "Fake GPU"));
    return made.state;
  };
  CHECK(state() == "1 device: Fake GPU (sm_90)");
  driver.version = 12040;
  CHECK(state() == "CUDA driver too old: it is for CUDA 12.4; expected CUDA 13.0 or later");
  driver.version = 13010;
  driver.init_result = kNoDevice;
  CHECK(state() == "no CUDA device");
  driver.init_result = 999;
  CHECK(state() == "the CUDA driver does not start: CUDA_ERROR_OTHER");
  driver.init_result = 0;
  driver.gpus.clear();
  CHECK(state() == "no CUDA device");
  driver.gpus = {{9, 0, 132}, {8, 6, 84}};
  CHECK(contains(state(), "2 devices: Fake GPU (sm_90), Fake GPU (sm_86)"));
  CHECK(driver.count("cuDevicePrimaryCtxRetain") == 0);  // it would take memory on every GPU
}

TEST_CASE("the machine's driver is used or its absence is said") {
  Driver driver;
  std::string problem;
  if (!load_driver(driver, problem)) CHECK(contains(problem, "CUDA driver"));
}

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

// ---- Attention ----------------------------------------------------------------------------------

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

TEST_CASE(
    "a step sends its lists once a stream, and after the first steps only sends and launches") {
  Setup s;
  const AttentionDesc desc = model();
  const Batch batch({{1, 3000}, {1, 700}});
  for (int step = 0; step < 3; ++step) {
    const AttentionPlan plan = make_plan(s.backend(), desc, batch);
    for (int layer = 0; layer < 4; ++layer)
      s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
  }
  CHECK(s.driver.copies[kStream] == 3);
  CHECK(s.driver.count("cuLaunchKernel") == 12);
  CHECK(s.driver.count("cuMemAlloc") == 1);  // one slab serves all steps
  CHECK(s.driver.count("cuMemHostAlloc") == 1);
  CHECK(s.driver.count("cuDevicePrimaryCtxRetain") == 1);
  CHECK(s.driver.count("cuFuncSetAttribute") == 2);  // fast and full decode
  CHECK(s.driver.count("cuCtxPushCurrent") == s.driver.count("cuCtxPopCurrent"));

  // While the device has not got past a step, the next one has memory of its own.
  s.driver.events_have_passed = false;
  std::vector<AttentionPlan> plans;
  for (int i = 0; i < 2; ++i) {
    AttentionPlan plan = make_plan(s.backend(), desc, batch);
    s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
  }
  CHECK(s.driver.count("cuMemAlloc") == 3);
}

TEST_CASE("streams have copies of their own") {
  Setup s;
  Seen<device::AttentionArgs> seen(s.driver);
  const AttentionDesc desc = model();
  const AttentionPlan plan = make_plan(s.backend(), desc, Batch({{1, 3000}}));
  const Handle other = reinterpret_cast<Handle>(0x99);
  for (const Handle stream : {kStream, other, kStream, other})
    s.backend().run(plan, params_of(desc, plan), {kGpu, stream});
  CHECK(s.driver.copies[kStream] == 1);
  CHECK(s.driver.copies[other] == 1);
  CHECK(seen.all[0].items == seen.all[2].items);
  CHECK(seen.all[0].items != seen.all[1].items);
  CHECK(seen.all[0].partial_values != seen.all[1].partial_values);
}

TEST_CASE("a capture sends its lists itself; runs outside of it do not rely on that") {
  Setup s;
  const AttentionDesc desc = model();
  {
    const AttentionPlan plan = make_plan(s.backend(), desc, Batch({{1, 100}}));
    s.driver.capture = 5;
    for (int layer = 0; layer < 3; ++layer)
      s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
    CHECK(s.driver.copies[kStream] == 1);
    s.driver.capture = 6;
    s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
    CHECK(s.driver.copies[kStream] == 2);
    s.driver.capture = 0;
    s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
    s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
    CHECK(s.driver.copies[kStream] == 3);
  }
  // What a graph reads is never given out again.
  const AttentionPlan next = make_plan(s.backend(), desc, Batch({{1, 100}}));
  CHECK(s.driver.count("cuMemAlloc") == 2);
}

TEST_CASE("each of several GPUs has its context, kernels and memory") {
  FakeDriver driver;
  driver.gpus = {{9, 0, 132}, {8, 0, 108}};
  const Driver table = FakeDriver::table();
  const Made made = make_backend(table, all_images());
  const AttentionDesc desc = model();
  std::vector<AttentionPlan> plans;
  for (int gpu = 0; gpu < 2; ++gpu) {
    const Device device{DeviceType::kCUDA, gpu};
    plans.push_back(make_plan(*made.backend, desc, Batch({{1, 100}}), device));
    made.backend->run(plans[gpu], params_of(desc, plans[gpu]), {device, kStream});
  }
  CHECK(driver.launches[0].context != driver.launches[1].context);
  CHECK(made.backend->device_info(1).isa == "sm_80");
  CHECK(made.backend->device_info(1).parallelism == 108);
  const Device second{DeviceType::kCUDA, 1};
  CHECK_THROWS_AS(made.backend->run(plans[0], params_of(desc, plans[0]), {second, kStream}),
                  InvalidArgument);
  CHECK_THROWS_AS(made.backend->device_info(2), InvalidArgument);
  CHECK_THROWS_AS(made.backend->device_info(-1), InvalidArgument);
}

TEST_CASE("a plan of another model, or of the CPU, is refused before anything is launched") {
  Setup s;
  const AttentionPlan plan = make_plan(s.backend(), model(), Batch({{1, 100}}));
  CHECK_THROWS_AS(s.backend().run(plan, params_of(model(64), plan), {kGpu, nullptr}),
                  InvalidArgument);
  AttentionPlan bare = plan;
  bare.on_device = nullptr;
  CHECK_THROWS_AS(s.backend().run(bare, params_of(model(), plan), {kGpu, nullptr}),
                  InvalidArgument);
  CHECK(s.driver.launches.empty());
}

TEST_CASE("a failing call is named, with what the driver says; the next one works") {
  for (const char* symbol : {"cuMemAlloc", "cuLibraryLoadData", "cuFuncSetAttribute",
                             "cuMemcpyHtoDAsync", "cuLaunchKernel", "cuDevicePrimaryCtxRetain"}) {
    Setup s;
    const AttentionDesc desc = model();
    const auto step = [&] {
      const AttentionPlan plan = make_plan(s.backend(), desc, Batch({{1, 100}}));
      s.backend().run(plan, params_of(desc, plan), {kGpu, kStream});
    };
    s.driver.failing[symbol] = 2;
    std::string message;
    try {
      step();
    } catch (const CudaError& error) {
      message = error.what();
    }
    CHECK(contains(message, symbol));
    CHECK(contains(message, "CUDA_ERROR_OUT_OF_MEMORY"));
    s.driver.failing.clear();
    step();
    CHECK(s.driver.launches.size() == 1);
    CHECK(s.driver.count("cuCtxPushCurrent") == s.driver.count("cuCtxPopCurrent"));
  }
}

TEST_CASE("threads share a backend, and a plan") {
  Setup s;
  const AttentionDesc desc = model();
  const AttentionPlan shared = make_plan(s.backend(), desc, Batch({{1, 3000}}));
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      const Handle stream = reinterpret_cast<Handle>(t < 4 ? 0x100 + t : 2);  // 2: per thread
      for (int i = 0; i < 50; ++i) {
        s.backend().run(shared, params_of(desc, shared), {kGpu, stream});
        const AttentionPlan own = make_plan(s.backend(), desc, Batch({{1, 100 + i}}));
        s.backend().run(own, params_of(desc, own), {kGpu, stream});
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(s.driver.count("cuLaunchKernel") == 800);
  CHECK(s.driver.copies[reinterpret_cast<Handle>(0x100)] == 51);
  CHECK(s.driver.copies[reinterpret_cast<Handle>(2)] == 4 + 4 * 50);
  CHECK(s.driver.count("cuFuncSetAttribute") == 2);
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

// ---- Cache operations ---------------------------------------------------------------------------

TensorView on_gpu(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view(data, dtype, shape);
  view.device = kGpu;
  return view;
}

TEST_CASE("append_kv: slots from the host, positions from the device, a rope") {
  Setup s;
  Seen<device::AppendArgs> seen(s.driver);
  alignas(16) static uint16_t memory[1 << 16];
  int64_t slots[] = {5, -1, 5, 12, 5, 0};  // every other one
  int32_t positions[3];
  float table[10 * 32];
  TensorView slot_view(slots, DType::kInt64, {3});
  slot_view.strides[0] = 2;
  const TensorView k = on_gpu(memory, DType::kFloat16, {3, 2, 64});
  const TensorView cache = on_gpu(memory + 4096, DType::kFloat16, {7, 16, 2, 64});
  Rope rope{on_gpu(table, DType::kFloat32, {10, 32}), on_gpu(positions, DType::kInt32, {3}), true};
  s.backend().append_kv(k, k, cache, cache, slot_view, &rope, {}, {kGpu, kStream});
  REQUIRE(seen.all.size() == 1);
  const device::AppendArgs& args = seen.all[0];
  CHECK(s.driver.launches[0].kernel == "append_kv_Float16_128");
  CHECK(s.driver.launches[0].blocks == 1);
  CHECK(args.slot_mapping[0] == 5);
  CHECK(args.slot_mapping[1] == 5);
  CHECK(args.slot_mapping[2] == 5);
  CHECK(args.num_slots == 112);
  CHECK(args.positions == positions);
  CHECK(args.rotary_dim == 32);
  CHECK(args.max_position == 10);
  CHECK(args.is_interleaved);
  CHECK(args.is_aligned);
  CHECK(args.k.cache.stride_outer == 16 * 2 * 64);
  CHECK(args.k.from.stride_outer == 128);
  s.driver.capture = 1;
  CHECK_THROWS_AS(
      s.backend().append_kv(k, k, cache, cache, slot_view, nullptr, {}, {kGpu, kStream}),
      InvalidArgument);
  const TensorView on_device = on_gpu(slots, DType::kInt64, {3});
  s.backend().append_kv(k, k, cache, cache, on_device, nullptr, {}, {kGpu, kStream});
  CHECK(seen.all.back().slot_mapping == slots);
  CHECK(s.driver.count("cuMemcpyHtoDAsync") == 1);
}

TEST_CASE("append_kv to codes: scales of every kind") {
  Setup s;
  Seen<device::AppendArgs> seen(s.driver);
  alignas(16) static uint16_t memory[1 << 16];
  alignas(4) static float scales[7 * 16 * 2];
  int64_t slots[] = {5, 0, 7};
  const TensorView slot_view = on_gpu(slots, DType::kInt64, {3});
  const TensorView k = on_gpu(memory, DType::kBFloat16, {3, 2, 64});
  const TensorView cache = on_gpu(memory + 4096, DType::kFloat8E4M3, {7, 16, 2, 64});
  float number = 0.5f;
  const KvScales given = {TensorView(&number, DType::kFloat32, {1}),
                          on_gpu(scales, DType::kFloat32, {7, 16, 2})};
  s.backend().append_kv(k, k, cache, cache, slot_view, nullptr, given, {kGpu, kStream});
  REQUIRE(seen.all.size() == 1);
  const device::AppendArgs& args = seen.all[0];
  CHECK(s.driver.launches[0].kernel == "append_kv_e4m3_BFloat16_128");
  CHECK(args.k.scale.value == 0.5f);
  CHECK(!args.k.scale.is_per_token);
  CHECK(args.v.scale.is_per_token);
  CHECK(args.v.scale.stride_block == 32);
  CHECK(args.v.codes.stride_row == 128);
  CHECK(args.is_aligned);
  const TensorView heads = on_gpu(scales, DType::kFloat32, {2});
  s.backend().append_kv(k, k, cache, cache, slot_view, nullptr, {{}, heads}, {kGpu, kStream});
  CHECK(seen.all[1].k.scale.value == 1.0f);
  CHECK(seen.all[1].v.scale.stride_head == 1);
  CHECK(!seen.all[1].v.scale.is_per_token);
  const TensorView bytes = on_gpu(memory + 4096, DType::kInt8, {7, 16, 2, 64});
  CHECK_THROWS_AS(
      s.backend().append_kv(k, k, bytes, bytes, slot_view, nullptr, {}, {kGpu, kStream}),
      Unsupported);
}

TEST_CASE("caches of any type are copied as bytes") {
  Setup s;
  Seen<device::CopyBlocksArgs> seen(s.driver);
  static float memory[1 << 14];
  const TensorView cache = on_gpu(memory, DType::kFloat32, {8, 4, 2, 24});
  int32_t pairs[] = {1, 2, 3, 4};
  s.backend().copy_blocks(cache, cache, TensorView(pairs, DType::kInt32, {2, 2}), {kGpu, nullptr});
  CHECK(seen.all[0].k.dim == 96);
  CHECK(seen.all[0].k.from.stride_outer == 4 * 4 * 2 * 24);
  CHECK(seen.all[0].pairs[3] == 4);
  CHECK(seen.all[0].num_pairs == 2);
  const TensorView rows = on_gpu(memory, DType::kFloat32, {2, 2, 24});
  const TensorView lses = on_gpu(memory, DType::kFloat32, {1, 2, 2});
  const TensorView outs = on_gpu(memory, DType::kFloat32, {1, 2, 2, 24});
  CHECK_THROWS_AS(s.backend().merge_states(outs, lses, rows, {}, {kGpu, nullptr}), Unsupported);
}

TEST_CASE("swap_blocks reaches pinned host memory and refuses other") {
  Setup s;
  Seen<device::CopyBlocksArgs> seen(s.driver);
  static uint16_t device_memory[4096], host_memory[4096];
  const TensorView device = on_gpu(device_memory, DType::kBFloat16, {4, 4, 2, 8});
  const TensorView host(host_memory, DType::kBFloat16, {4, 4, 2, 8});
  int32_t pair[] = {3, 0};
  const TensorView pairs(pair, DType::kInt32, {1, 2});
  CHECK_THROWS_AS(s.backend().swap_blocks(device, host, pairs, {kGpu, kStream}), InvalidArgument);
  s.driver.pinned.insert(host_memory);
  s.backend().swap_blocks(device, host, pairs, {kGpu, kStream});
  s.backend().swap_blocks(host, device, pairs, {kGpu, kStream});
  CHECK(static_cast<void*>(seen.all[0].k.to.data) == host_memory);
  CHECK(static_cast<void*>(seen.all[1].k.from.data) == host_memory);
  CHECK(seen.all[0].v.dim == 0);
}

TEST_CASE("nothing to do launches nothing") {
  Setup s;
  const TensorView none = on_gpu(nullptr, DType::kFloat16, {0, 2, 64});
  const TensorView cache = on_gpu(nullptr, DType::kFloat16, {7, 16, 2, 64});
  s.backend().append_kv(none, none, cache, cache, TensorView(nullptr, DType::kInt64, {0}), nullptr,
                        {}, {kGpu, nullptr});
  s.backend().copy_blocks(cache, cache, TensorView(nullptr, DType::kInt32, {0, 2}),
                          {kGpu, nullptr});
  CHECK(s.driver.count("cuLaunchKernel") == 0);
}

}  // namespace
}  // namespace quire::cuda
