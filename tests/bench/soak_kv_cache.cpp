// SPDX-License-Identifier: Apache-2.0
// Soak: random calls of a KVCacheManager, validated now and then; memory must stay flat.
//
//   soak_kv_cache [calls = 10000000] [seed = 1]
//
// Prints resident memory after the first tenth, when all buffers have found their size, and at
// the end; fails when it has grown by more than 10 % + 1 MiB, or when a block has leaked.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>

#include "../cpp/kv_traffic.h"

namespace {

struct Random {
  std::mt19937_64 engine;
  uint32_t next() { return static_cast<uint32_t>(engine() >> 32); }
};

int64_t resident_bytes() {
  int64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t num_calls = argc > 1 ? std::atoll(argv[1]) : 10'000'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const kv_traffic::Shape shape{.num_blocks = 400,
                                .block_size = 4,
                                .prefix_caching = true,
                                .async_depth = 2,
                                .max_seqs = 32,
                                .max_tokens = 160};
  quire::KVCacheManager manager(shape.num_blocks, shape.block_size, shape.prefix_caching,
                                shape.async_depth);
  Random random{std::mt19937_64(seed)};
  kv_traffic::Traffic traffic(manager, manager, shape, random);
  const auto start = std::chrono::steady_clock::now();
  int64_t warm = 0;
  for (int64_t n = 1; n <= num_calls; ++n) {
    traffic.call();
    if (n % 10'000 == 0) manager.validate();
    if (n == (num_calls + 9) / 10) warm = resident_bytes();
  }
  traffic.free_all();
  manager.validate();
  const int64_t end = resident_bytes();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const quire::KVCacheStats stats = manager.stats();
  std::printf(
      "%lld calls (%lld refused), %lld steps, %lld blocks evicted, %.1f s\n"
      "resident after a tenth %.2f MiB, at the end %.2f MiB; used blocks at the end %d\n",
      static_cast<long long>(num_calls), static_cast<long long>(traffic.num_refused()),
      static_cast<long long>(manager.batch().ticket()),
      static_cast<long long>(stats.evicted_blocks), seconds.count(),
      static_cast<double>(warm) / (1 << 20), static_cast<double>(end) / (1 << 20),
      stats.used_blocks);
  return stats.used_blocks == 0 && end <= warm + warm / 10 + (1 << 20) ? 0 : 1;
}
