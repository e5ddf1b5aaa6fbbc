// SPDX-License-Identifier: Apache-2.0
// A libquire_cuda.so whose GPU is the emulator: beside the core it makes "cuda:0" usable on any
// machine, with everything but the driver and the machine code as it is on a GPU. A tensor "on the
// device" is memory of the host.
#include <stdexcept>
#include <variant>
#include <vector>

#include "backend.h"
#include "emulated/bodies.h"
#include "emulator/launch.h"
#include "fake_driver.h"
#include "kernels/launch.h"

namespace quire::cuda {
namespace {

const Image kImages[] = {{"prefill_64", ""},
                         {"prefill_128", ""},
                         {"prefill_256", ""},
                         {"prefill_sm90_64", ""},
                         {"prefill_sm90_128", ""},
                         {"prefill_sm90_256", ""},
                         {"prefill_sm90_e4m3_64", ""},
                         {"prefill_sm90_e4m3_128", ""},
                         {"decode_64", ""},
                         {"decode_128", ""},
                         {"decode_256", ""},
                         {"prefill_e4m3_64", ""},
                         {"prefill_e4m3_128", ""},
                         {"prefill_e4m3_256", ""},
                         {"decode_e4m3_64", ""},
                         {"decode_e4m3_128", ""},
                         {"decode_e4m3_256", ""},
                         {"mla_decode_576", ""},
                         {"mla_decode_sm90_576", ""},
                         {"cache_ops", ""}};
const Images kAll = {std::begin(kImages), std::end(kImages), "90a"};

// Runs the kernel, every time with another order of blocks and warps and another fate of the
// copies in flight. What the emulator finds wrong becomes an exception.
void run_on_emulator(const FakeLaunch& launch) {
  static uint32_t seed = 0;
  KernelBody body = prefill_body(launch.kernel);
  if (!body) body = prefill_sm90_body(launch.kernel);
  if (!body) body = decode_body(launch.kernel);
  if (!body) body = mla_decode_body(launch.kernel);
  if (!body) body = cache_op_body(launch.kernel);
  if (!body) throw std::runtime_error("emulated GPU: no kernel " + launch.kernel);
  emulator::Options options;
  options.seed = ++seed;
  options.async = static_cast<emulator::AsyncMode>(seed % 3);
  const emulator::Report report =
      emulator::launch({static_cast<int>(launch.blocks), static_cast<int>(launch.threads),
                        static_cast<int>(launch.shared_bytes)},
                       options, [&] { body(launch.args); });
  if (!report.ok()) throw std::runtime_error(launch.kernel + ": " + report.error);
}

// A graph: launches that a capture keeps instead of running them.
struct KeptLaunch {
  FakeLaunch launch;
  std::variant<device::PlanArgs, device::BoxedAttentionArgs> args;
};
std::vector<KeptLaunch> graph;
FakeDriver* fake = nullptr;

void run_or_keep(const FakeLaunch& launch) {
  if (fake->capture == 0) return run_on_emulator(launch);
  graph.push_back({launch, {}});
  if (launch.kernel.rfind("plan_", 0) == 0)
    graph.back().args = *static_cast<const device::PlanArgs*>(launch.args);
  else
    graph.back().args = *static_cast<const device::BoxedAttentionArgs*>(launch.args);
}

}  // namespace
}  // namespace quire::cuda

extern "C" __attribute__((visibility("default"))) quire::Backend* quire_cuda_backend(
    std::string* state) {
  using namespace quire::cuda;
  fake = new FakeDriver;
  static auto* table = new Driver(FakeDriver::table());
  static auto* made = new Made(make_backend(*table, kAll));
  fake->on_launch = run_or_keep;
  fake->gpus[0].multiprocessors = 4;
  fake->all_is_pinned = true;
  *state = made->state;
  return made->backend.get();
}

// What stands for a captured graph: begun (id other than 0) and ended (0), then replayed, which
// returns what went wrong or null.
extern "C" __attribute__((visibility("default"))) void emulated_gpu_capture(uint64_t id) {
  quire::cuda::fake->capture = id;
  if (id != 0) quire::cuda::graph.clear();
}

extern "C" __attribute__((visibility("default"))) const char* emulated_gpu_replay() try {
  for (quire::cuda::KeptLaunch& kept : quire::cuda::graph) {
    std::visit([&](auto& args) { kept.launch.args = &args; }, kept.args);
    quire::cuda::run_on_emulator(kept.launch);
  }
  return nullptr;
} catch (const std::exception& error) {
  static std::string text;
  text = error.what();
  return text.c_str();
}
