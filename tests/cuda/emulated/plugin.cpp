// SPDX-License-Identifier: Apache-2.0
// A libquire_cuda.so whose GPU is the emulator: beside the core it makes "cuda:0" usable on any
// machine, with everything but the driver and the machine code as it is on a GPU. A tensor "on the
// device" is memory of the host.
#include <stdexcept>

#include "backend.h"
#include "emulated/bodies.h"
#include "emulator/launch.h"
#include "fake_driver.h"

namespace quire::cuda {
namespace {

const Image kImages[] = {
    {"prefill_64", ""},       {"prefill_128", ""},      {"prefill_256", ""},
    {"prefill_sm90_64", ""},  {"prefill_sm90_128", ""}, {"decode_64", ""},
    {"decode_128", ""},       {"decode_256", ""},       {"prefill_e4m3_128", ""},
    {"prefill_e4m3_256", ""}, {"decode_e4m3_128", ""},  {"decode_e4m3_256", ""},
    {"mla_decode_576", ""},   {"cache_ops", ""}};
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

}  // namespace
}  // namespace quire::cuda

extern "C" __attribute__((visibility("default"))) quire::Backend* quire_cuda_backend(
    std::string* state) {
  using namespace quire::cuda;
  static auto* fake = new FakeDriver;
  static auto* table = new Driver(FakeDriver::table());
  static auto* made = new Made(make_backend(*table, kAll));
  fake->on_launch = run_on_emulator;
  fake->gpus[0].multiprocessors = 4;
  fake->all_is_pinned = true;
  *state = made->state;
  return made->backend.get();
}
