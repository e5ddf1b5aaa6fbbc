// SPDX-License-Identifier: Apache-2.0
#include "quire/roofs.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <utility>

#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "quire/backend.h"

namespace quire {
namespace {

std::atomic<float> sink;  // so that no loop is for nothing

// Seconds from the first to the last of `f`, which runs for each of num_threads() indices.
template <class F>
double seconds_of(F f) {
  const auto start = std::chrono::steady_clock::now();
  cpu::parallel_for(num_threads(), f);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double multiply_add_rate(bool bfloat16_pairs) {
  const cpu::Kernels& kernels = cpu::kernels_in_use();
  const auto run = [&](int64_t rounds) {
    std::atomic<double> done = 0;
    const double seconds = seconds_of([&](int64_t) {
      float value = 1e-3f;
      done += kernels.multiply_adds(rounds, bfloat16_pairs, &value);
      sink = value;
    });
    return std::pair{done / seconds, seconds};
  };
  int64_t rounds = 10'000;
  const double probe = run(rounds).second;
  rounds = static_cast<int64_t>(static_cast<double>(rounds) * std::clamp(0.02 / probe, 1.0, 1e4));
  return run(rounds).first;
}

double read_rate(const float* data, size_t count) {
  const int64_t part = static_cast<int64_t>(count) / num_threads();
  const double seconds =
      seconds_of([&](int64_t i) { sink = cpu::kernels_in_use().read_all(data + i * part, part); });
  return static_cast<double>(part * num_threads()) * sizeof(float) / seconds;
}

}  // namespace quire
