// SPDX-License-Identifier: Apache-2.0
// The CUDA backend over a driver that only pretends: how it starts, what it asks of the driver and
// what it never does, streams and captures, several GPUs, failures, threads.
#include <doctest/doctest.h>

#include <thread>

#include "backend_setup.h"

namespace quire::cuda {
namespace {

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

}  // namespace
}  // namespace quire::cuda
