// SPDX-License-Identifier: Apache-2.0
// The thread pool: each index once, exceptions, concurrent and nested callers, resizing, fork.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/available_cpus.h"
#include "cpu/thread_pool.h"
#include "quire/backend.h"
#include "quire/error.h"

using namespace quire;
using cpu::parallel_for;

namespace {

// True if a loop over `count` indices calls each of them once.
bool covers(int64_t count) {
  std::vector<std::atomic<int>> calls(count);
  parallel_for(count, [&](int64_t i) { ++calls[i]; });
  for (const std::atomic<int>& n : calls)
    if (n != 1) return false;
  return true;
}

}  // namespace

TEST_CASE("every index is called once, at any size of the pool") {
  for (int threads : {1, 2, 5, 3, 16, 1, 2}) {
    set_num_threads(threads);
    CHECK(num_threads() == threads);
    for (int64_t count : {0, 1, 2, 7, 1000}) CHECK(covers(count));
  }
}

TEST_CASE("calls in quick succession, as layers make them") {
  set_num_threads(3);
  std::atomic<int64_t> sum{0};
  for (int round = 0; round < 2000; ++round) parallel_for(5, [&](int64_t i) { sum += i; });
  CHECK(sum == 2000 * 10);
}

TEST_CASE("an exception reaches the caller, and the pool lives on") {
  for (int threads : {1, 4}) {
    set_num_threads(threads);
    for (int64_t bad : {0, 50, 99})
      CHECK_THROWS_AS(parallel_for(100,
                                   [&](int64_t i) {
                                     if (i == bad) throw std::runtime_error("bad");
                                   }),
                      std::runtime_error);
    CHECK(covers(100));
  }
}

TEST_CASE("several host threads may call at once") {
  set_num_threads(3);
  std::atomic<int> failures{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      for (int round = 0; round < 100; ++round) failures += !covers(20);
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(failures == 0);
}

TEST_CASE("the pool may be resized while others use it") {
  std::atomic<bool> stop{false};
  std::atomic<int> failures{0};
  std::thread caller([&] {
    while (!stop) failures += !covers(20);
  });
  for (int round = 0; round < 50; ++round) set_num_threads(1 + round % 4);
  stop = true;
  caller.join();
  CHECK(failures == 0);
}

TEST_CASE("a loop inside a loop is run by its caller alone") {
  set_num_threads(4);
  std::atomic<int> calls{0};
  parallel_for(8, [&](int64_t) {
    const auto caller = std::this_thread::get_id();
    parallel_for(8, [&](int64_t) { calls += std::this_thread::get_id() == caller; });
  });
  CHECK(calls == 64);
}

TEST_CASE("idle threads sleep") {
  set_num_threads(4);
  CHECK(covers(100));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  CHECK(std::clock() - before < CLOCKS_PER_SEC / 20);
}

#if !defined(__SANITIZE_THREAD__)  // which does not support threads after a fork
TEST_CASE("after a fork the child has a pool of its own") {
  set_num_threads(3);
  CHECK(covers(100));
  const pid_t child = fork();
  if (child == 0) _exit(num_threads() == 3 && covers(100) && covers(100) ? 0 : 1);
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(covers(100));
}
#endif

TEST_CASE("a pool has at least one thread") {
  set_num_threads(2);
  CHECK_THROWS_AS(set_num_threads(0), InvalidArgument);
  CHECK(num_threads() == 2);
}

TEST_CASE("the quotas of control groups count, the least of them") {
  std::string root = (std::filesystem::temp_directory_path() / "quire_cgroup_XXXXXX").string();
  REQUIRE(mkdtemp(root.data()));
  const auto write = [&](const std::string& file, const std::string& text) {
    const std::filesystem::path path = root + file;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
  };
  const std::string v2 = "0::/slice/pod/job\n";
  const std::string v1 = "9:name=systemd:/x\n4:cpu,cpuacct:/pod\n3:cpuset:/\n0::/\n";
  CHECK(std::isinf(cpu::cgroup_quota(v2, root)));
  write("/slice/pod/job/cpu.max", "max 100000\n");
  CHECK(std::isinf(cpu::cgroup_quota(v2, root)));
  write("/slice/pod/cpu.max", "350000 100000\n");
  CHECK(cpu::cgroup_quota(v2, root) == 3.5);
  write("/slice/pod/job/cpu.max", "800000 100000\n");
  write("/slice/cpu.max", "400000 100000\n");
  CHECK(cpu::cgroup_quota(v2, root) == 3.5);
  CHECK(cpu::cgroup_quota("0::/slice\n", root) == 4);
  CHECK(cpu::cgroup_quota("0::/a/path/of/the/host\n", root + "/slice") == 4);

  CHECK(std::isinf(cpu::cgroup_quota(v1, root)));
  write("/cpu,cpuacct/pod/cpu.cfs_quota_us", "-1\n");
  write("/cpu,cpuacct/pod/cpu.cfs_period_us", "100000\n");
  CHECK(std::isinf(cpu::cgroup_quota(v1, root)));
  write("/cpu,cpuacct/pod/cpu.cfs_quota_us", "150000\n");
  CHECK(cpu::cgroup_quota(v1, root) == 1.5);
  write("/cpu/cpu.cfs_quota_us", "50000\n");
  write("/cpu/cpu.cfs_period_us", "100000\n");
  CHECK(cpu::cgroup_quota(v1, root) == 0.5);
  for (const char* nonsense : {"", "4", "4:cpu", "4:cpu:", "no colons\n\n::\n"})
    CHECK(std::isinf(cpu::cgroup_quota(nonsense, root)));
  std::filesystem::remove_all(root);
  CHECK(cpu::available_cpus() >= 1);
}
