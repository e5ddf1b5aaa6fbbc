// SPDX-License-Identifier: Apache-2.0
// Writes what this GPU answers to the probes: a line each "probe case word word ...", in
// hexadecimal, lane after lane.
//
//   nvcc -std=c++17 -arch=native -Itests -Icuda -Icpp/include tests/emulator/golden/record.cu
#include <cstdio>
#include <cstdlib>

#include "emulator/golden/inputs.h"

namespace quire::device::golden {
namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

template <class Probe>
__global__ void answer(const uint32_t* in, uint32_t* out) {
  Probe::run(in + threadIdx.x * kWords, out + threadIdx.x * kWords);
}

template <class Probe>
void record(const char* name, int probe) {
  constexpr size_t kBytes = kWarpSize * kWords * 4;
  uint32_t *in, *out;
  check(cudaMalloc(&in, kBytes));
  check(cudaMalloc(&out, kBytes));
  for (int index = 0; index < kCases; ++index) {
    const std::vector<uint32_t> words = make_input(Probe::kInput, probe, index);
    std::vector<uint32_t> results(words.size());
    check(cudaMemcpy(in, words.data(), kBytes, cudaMemcpyHostToDevice));
    answer<Probe><<<1, kWarpSize, kSharedBytes>>>(in, out);
    check(cudaGetLastError());
    check(cudaMemcpy(results.data(), out, kBytes, cudaMemcpyDeviceToHost));
    std::printf("%s %d", name, index);
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < Probe::kOut; ++i) std::printf(" %x", results[lane * kWords + i]);
    std::printf("\n");
  }
  check(cudaFree(in));
  check(cudaFree(out));
}

}  // namespace
}  // namespace quire::device::golden

int main() {
  using namespace quire::device;
  using namespace quire::device::golden;
  int probe = 0;
#define QUIRE_RECORD(name, ...) record<__VA_ARGS__>(#name, probe++);
  QUIRE_PROBES(QUIRE_RECORD)
  return 0;
}
