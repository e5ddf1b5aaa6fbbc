// SPDX-License-Identifier: Apache-2.0
// What the KV runtime costs without Python: CPU time of this thread, least and median, in us.
//
//     cmake --build --preset dev --target bench_kv_cache && build-dev/tests/cpp/bench_kv_cache
//
// With the argument "threads" instead: how long steps take while other threads read. Not under a
// realtime priority: the readers never sleep.
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "quire/kv_cache_manager.h"

using quire::KVCacheManager;
using quire::SequenceId;
using Ids = std::vector<int32_t>;

namespace {

constexpr int32_t kBlockSize = 16;

double now_us() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) * 1e-3;
}

struct Timer {
  std::vector<double> times;
  double begin = 0;
  void start() { begin = now_us(); }
  void stop(double calls = 1) { times.push_back((now_us() - begin) / calls); }
  void print(const char* name) {
    std::sort(times.begin(), times.end());
    std::printf("%-44s %8.2f %8.2f\n", name, times.front(), times[times.size() / 2]);
  }
};

Ids random_tokens(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  Ids tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 128'000);
  return tokens;
}

void run(KVCacheManager& manager, SequenceId seq) {
  const Ids count{static_cast<int32_t>(manager.num_tokens(seq) - manager.num_computed_tokens(seq))};
  manager.step({&seq, 1}, count);
  manager.commit({&seq, 1});
}

void bench_decode(const char* name, int32_t batch, bool caching) {
  KVCacheManager manager(batch * 400, kBlockSize, caching);
  std::mt19937 random(1);
  std::vector<SequenceId> seqs;
  Ids counts;
  for (int32_t i = 0; i < batch; ++i) {
    counts.push_back(1024 + static_cast<int32_t>(random() % 512));
    seqs.push_back(manager.create(random_tokens(counts.back(), i)));
  }
  const Ids ones(batch, 1), sampled = random_tokens(batch, 9);
  manager.step(seqs, counts);
  manager.commit(seqs, sampled);
  Timer timer;
  for (int turn = 0; turn < 200; ++turn) {
    timer.start();
    for (int32_t i = 0; i < kBlockSize; ++i) {  // every sequence begins one block
      manager.step(seqs, ones);
      manager.commit(seqs, sampled);
    }
    timer.stop(kBlockSize);
  }
  timer.print(name);
}

void bench_match() {
  KVCacheManager manager(4096, kBlockSize);
  Ids tokens = random_tokens(8192, 2);
  const SequenceId seq = manager.create(tokens);
  run(manager, seq);
  manager.free({&seq, 1});
  tokens.push_back(7);
  Timer timer;
  for (int turn = 0; turn < 1000; ++turn) {
    timer.start();
    for (int i = 0; i < 8; ++i)
      if (manager.match(tokens).num_tokens != 8192) std::abort();
    timer.stop(8);
  }
  timer.print("match of 8,192 cached tokens");
}

// With nothing of it in any cache, as a prompt's tokens and a tree that other work has pushed out.
// Beside it the floor: memcmp() of two arrays of as many tokens, as cold.
void bench_cold_match() {
  KVCacheManager manager(4096, kBlockSize);
  Ids tokens = random_tokens(8192, 2);
  const SequenceId seq = manager.create(tokens);
  run(manager, seq);
  manager.free({&seq, 1});
  tokens.push_back(7);
  const Ids same = tokens;
  std::vector<int64_t> others(size_t{16} << 20);  // 128 MiB: more than any cache
  int64_t sum = 0;
  const auto flush = [&] {
    for (int64_t& other : others) sum += ++other;
  };
  Timer match, compare, system;
  for (int turn = 0; turn < 40; ++turn) {
    flush();
    system.start();
    system.stop();
    match.start();
    if (manager.match(tokens).num_tokens != 8192) std::abort();
    match.stop();
    flush();
    system.start();
    system.stop();
    compare.start();
    if (std::memcmp(tokens.data(), same.data(), 8192 * sizeof(int32_t)) != 0) std::abort();
    compare.stop();
  }
  if (sum == 0) std::abort();
  match.print("the same, nothing of it in a cache");
  compare.print("  beside it: memcmp of 2 x 32 KiB, as cold");
  system.print("  beside it: two looks at the clock");
}

// Blocks alone: one token has a slot, the other blocks are lookahead.
void bench_allocate(const char* name, bool evicting) {
  KVCacheManager manager(4096, kBlockSize, evicting);
  const Ids one{1};
  Timer timer;
  for (uint32_t turn = 0; turn < 500; ++turn) {
    if (evicting) {
      const SequenceId filler = manager.create(random_tokens(512 * kBlockSize, turn));
      run(manager, filler);
      manager.free({&filler, 1});
    }
    const SequenceId seq = manager.create(Ids{static_cast<int32_t>(turn)});
    timer.start();
    manager.step({&seq, 1}, one, 512 * kBlockSize - 1);
    manager.free({&seq, 1});
    timer.stop();
    if (evicting) {  // the freed blocks are filled again, so that the next step must evict
      const SequenceId filler = manager.create(random_tokens(512 * kBlockSize, 10'000 + turn));
      run(manager, filler);
      manager.free({&filler, 1});
    }
  }
  timer.times.erase(timer.times.begin(), timer.times.begin() + 16);
  timer.print(name);
}

void bench_fork() {
  KVCacheManager manager(4096, kBlockSize);
  const SequenceId seq = manager.create(random_tokens(512 * kBlockSize + 5, 3));
  run(manager, seq);
  std::vector<SequenceId> children(64);
  Timer timer;
  for (int turn = 0; turn < 1000; ++turn) {
    timer.start();
    manager.fork(seq, children);
    timer.stop();
    manager.free(children);
  }
  timer.print("fork into 64 children, 512 blocks");
}

// Steps of 256 sequences, timed by the clock, while other threads ask for a prefix again and again.
void bench_readers(int num_readers) {
  KVCacheManager manager(256 * 40 + 1024, kBlockSize);
  Ids asked = random_tokens(8192, 2);
  const SequenceId kept = manager.create(asked);
  run(manager, kept);
  asked.push_back(7);
  std::vector<SequenceId> seqs;
  for (uint32_t i = 0; i < 256; ++i) seqs.push_back(manager.create(random_tokens(64 + i % 16, i)));
  for (SequenceId seq : seqs) run(manager, seq);
  const Ids ones(256, 1), sampled = random_tokens(256, 9);
  manager.commit(seqs, sampled);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> num_asked{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < num_readers; ++i)
    readers.emplace_back([&] {
      for (; !stop; ++num_asked)
        if (manager.match(asked).num_tokens != 8192) std::abort();
    });
  std::vector<double> times;
  const auto start = std::chrono::steady_clock::now();
  while (times.size() < 8000) {
    const auto begin = std::chrono::steady_clock::now();
    manager.step(seqs, ones);
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - begin;
    times.push_back(time.count());
    manager.commit(seqs, sampled);
    if (times.size() % 500 == 0) {
      for (SequenceId seq : seqs) manager.truncate(seq, 64);
      manager.commit(seqs, sampled);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  const std::chrono::duration<double> whole = std::chrono::steady_clock::now() - start;
  stop = true;
  for (std::thread& reader : readers) reader.join();
  std::sort(times.begin(), times.end());
  std::printf("step, 256 sequences, %d threads match %10.0f/s", num_readers,
              static_cast<double>(num_asked) / whole.count());
  for (double share : {0.5, 0.9, 0.99, 0.999, 1.0})
    std::printf(" %8.2f",
                times[static_cast<size_t>(share * static_cast<double>(times.size() - 1))]);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "threads") == 0) {
    std::printf("%-53s %8s %8s %8s %8s %8s\n", "us by the clock", "median", "p90", "p99", "p99.9",
                "max");
    for (int num_readers : {0, 1, 2}) bench_readers(num_readers);
    return 0;
  }
  std::printf("%-44s %8s %8s\n", "us of CPU time", "min", "median");
  bench_decode("step + commit, 256 sequences", 256, true);
  bench_decode("step + commit, 1000 sequences", 1000, true);
  bench_decode("step + commit, 256 sequences, no caching", 256, false);
  bench_decode("step + commit, 1000 sequences, no caching", 1000, false);
  bench_match();
  bench_cold_match();
  bench_allocate("allocate + free 512 blocks, no caching", false);
  bench_allocate("the same, every block evicts a cached one", true);
  bench_fork();
  return 0;
}
