// SPDX-License-Identifier: Apache-2.0
// The emulator must see every class of mistake that it claims to see, and must not cry wolf.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "emulator/launch.h"
#include "prim/sm80.h"

namespace quire::device {
namespace {

using emulator::AsyncMode;
using emulator::Grid;
using emulator::Options;
using emulator::Report;

constexpr AsyncMode kAsyncModes[] = {AsyncMode::kLazy, AsyncMode::kEager, AsyncMode::kRandom};

SharedAddress word(int index) { return shared_base() + 4 * static_cast<uint32_t>(index); }

void require(bool condition) {
  if (!condition) emulator::Block::current().fail("wrong value");
}

// Runs for several seeds; every error must contain `expected`, or there must be none ("").
template <class Kernel>
void expect(const char* expected, const Grid& grid, Kernel kernel, Options options = {}) {
  for (uint32_t seed = 1; seed <= 10; ++seed) {
    options.seed = seed;
    const Report report = emulator::launch(grid, options, kernel);
    INFO("seed " << seed << ": " << report.error);
    if (*expected)
      CHECK(report.error.find(expected) != std::string::npos);
    else
      CHECK(report.ok());
  }
}

TEST_CASE("threads see what others stored before a barrier") {
  expect("", {2, 96, 4 * 96}, [] {
    const int me = thread_index();
    st_shared<uint32_t>(word(me), 100 + me);
    sync_block();
    require(ld_shared<uint32_t>(word((me + 50) % 96)) ==
            static_cast<uint32_t>(100 + (me + 50) % 96));
  });
}

TEST_CASE("a missing barrier is a race, whatever the schedule") {
  expect("race", {1, 64, 4 * 64}, [] {
    st_shared<uint32_t>(word(thread_index()), 1);
    ld_shared<uint32_t>(word(thread_index() ^ 32));
  });
  expect("race", {1, 32, 4 * 32}, [] {  // within a warp too
    st_shared<uint32_t>(word(thread_index()), 1);
    ld_shared<uint32_t>(word(thread_index() ^ 1));
  });
  expect("race", {1, 64, 4}, [] {
    ld_shared<uint32_t>(word(0));
    if (thread_index() == 40) st_shared<uint32_t>(word(0), 1);
  });
}

TEST_CASE("a warp sync orders the lanes of a warp, and them alone") {
  const auto kernel = [](int distance) {
    st_shared<uint32_t>(word(thread_index()), 1);
    sync_warp();
    ld_shared<uint32_t>(word(thread_index() ^ distance));
  };
  expect("", {1, 64, 4 * 64}, [&] { kernel(5); });
  expect("race", {1, 64, 4 * 64}, [&] { kernel(32); });
}

TEST_CASE("shuffles do not order memory") {
  expect("race", {1, 32, 4 * 32}, [] {
    st_shared<uint32_t>(word(thread_index()), 1);
    shuffle_xor(1.0f, 1);
    ld_shared<uint32_t>(word(thread_index() ^ 1));
  });
}

TEST_CASE("lanes that part ways are named") {
  expect("diverged", {1, 32, 4}, [] {
    if (thread_index() < 16)
      shuffle_xor(1.0f, 1);
    else
      shuffle_xor(2.0f, 1);
  });
  expect("deadlock", {1, 64, 4}, [] {
    if (thread_index() != 7) sync_block();
  });
  expect("diverged", {1, 64, 4}, [] {
    if (thread_index() < 32)
      sync_block();
    else
      sync_block();
  });
}

TEST_CASE("shared memory has bounds and alignment, and begins as NaN") {
  expect("of 64", {1, 32, 64}, [] { ld_shared<uint32_t>(word(16)); });
  expect("not aligned", {1, 32, 64}, [] { ld_shared<U32x4>(word(1)); });
  expect("", {1, 32, 64}, [] { require(ld_shared<uint32_t>(word(3)) == ~0u); });
}

TEST_CASE("global memory has bounds and alignment") {
  std::vector<float> data(8);
  Options options;
  options.global.allow(data.data(), 7 * sizeof(float));
  expect("", {1, 32, 4}, [&] { ld_global(&data[6]); }, options);
  expect("outside", {1, 32, 4}, [&] { ld_global(&data[7]); }, options);
  const char* bytes = reinterpret_cast<const char*>(data.data());
  expect("not aligned", {1, 32, 4}, [&] { ld_global(reinterpret_cast<const float*>(bytes + 2)); });
}

struct alignas(16) Source {
  uint32_t words[256];
};

// Every thread copies 16 bytes and reads its neighbour's.
template <int kGroupsLeft, bool kSync, int kGroups = 1>
void copy_and_read(const Source& source) {
  const int me = thread_index();
  for (int i = 0; i < kGroups; ++i) {
    cp_async<16>(word(4 * me + 256 * i), &source.words[4 * me], 16);
    cp_async_commit();
  }
  cp_async_wait<kGroupsLeft>();
  if constexpr (kSync) sync_block();
  const uint32_t got = ld_shared<uint32_t>(word(4 * (me ^ 33)));
  if (kSync) require(got == source.words[4 * (me ^ 33)]);
  cp_async_wait<0>();
}

TEST_CASE("asynchronous copies are complete after wait and barrier, not before") {
  Source source;
  for (int i = 0; i < 256; ++i) source.words[i] = i;
  for (AsyncMode mode : kAsyncModes) {
    Options options;
    options.async = mode;
    expect("", {1, 64, 1024}, [&] { copy_and_read<0, true>(source); }, options);
    expect("", {1, 64, 2048}, [&] { copy_and_read<1, true, 2>(source); }, options);
    expect("in flight", {1, 64, 1024}, [&] { copy_and_read<1, true>(source); }, options);
    expect("shared byte", {1, 64, 1024}, [&] { copy_and_read<0, false>(source); }, options);
  }
  expect("copies in flight", {1, 32, 1024},
         [&] { cp_async<16>(word(4 * thread_index()), &source.words[0], 16); });
}

TEST_CASE("asynchronous copies fill with zeros") {
  Source source;
  for (int i = 0; i < 256; ++i) source.words[i] = i + 1;
  expect("", {1, 32, 1024}, [&] {
    const int me = thread_index();
    cp_async<16>(word(8 * me), &source.words[4 * me], me % 2 ? 16 : 0);
    cp_async<8>(word(8 * me + 4), &source.words[4 * me], 4);
    cp_async<4>(word(8 * me + 6), &source.words[4 * me], 4);
    cp_async_commit();
    cp_async_wait<0>();
    const U32x4 first = ld_shared<U32x4>(word(8 * me));
    const uint32_t value = 4 * me + 1;
    require(first.x == (me % 2 ? value : 0) && first.w == (me % 2 ? value + 3 : 0));
    const U32x2 second = ld_shared<U32x2>(word(8 * me + 4));
    require(second.x == value && second.y == 0);
    require(ld_shared<uint32_t>(word(8 * me + 6)) == value);
  });
}

TEST_CASE("stores for other blocks must be fenced before they are announced") {
  uint32_t counter = 0;
  std::vector<float> data(64);
  const auto kernel = [&](bool fence) {
    st_global(&data[thread_index()], 1.0f);
    if (fence) fence_gpu();
    sync_block();
    if (thread_index() == 0) atomic_increment(&counter, 2);
  };
  expect("", {3, 64, 4}, [&] { kernel(true); });
  CHECK(counter == 0);  // 3 blocks: it has wrapped
  expect("not fenced", {3, 64, 4}, [&] { kernel(false); });
}

TEST_CASE("a run depends on its seed alone") {
  const auto order = [](uint32_t seed) {
    std::vector<int> seen;
    Options options;
    options.seed = seed;
    emulator::launch({3, 64, 4}, options, [&] {
      seen.push_back(block_index() * 64 + thread_index());
      sync_block();
      seen.push_back(block_index() * 64 + thread_index());
    });
    return seen;
  };
  CHECK(order(1) == order(1));
  CHECK(order(1) != order(2));
}

}  // namespace
}  // namespace quire::device
