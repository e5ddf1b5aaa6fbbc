// SPDX-License-Identifier: Apache-2.0
// Files that are torn, rotten, foreign or half written; a full disk; a process that is killed.
#include <doctest/doctest.h>

#include <sys/resource.h>
#include <sys/wait.h>

#include <csignal>
#include <fstream>

#include "kv_store/block_file.h"
#include "quire/error.h"
#include "store_case.h"

using namespace quire;
using namespace store_case;

namespace {

std::unique_ptr<KVStore> open(const TemporaryFolder& folder, int64_t capacity = 100,
                              int64_t block_bytes = 1000, const std::string& identity = "") {
  return open_file_store({folder.path(), capacity * block_bytes, block_bytes, identity});
}

void fill(const TemporaryFolder& folder, int32_t count) {
  const auto store = open(folder);
  for (int32_t i = 0; i < count; ++i) REQUIRE(put(*store, i) == KVOutcome::kDone);
}

void flip_bit(const std::filesystem::path& path, std::streamoff byte, int bit) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(byte);
  const char value = static_cast<char>(file.get() ^ 1 << bit);
  file.seekp(byte);
  file.put(value);
}

// A store is opened on the damaged directory: nothing is delivered, the file is gone and counted.
void check_dropped(const TemporaryFolder& folder) {
  const auto store = open(folder);
  CHECK(get(*store, 0) == KVOutcome::kMissing);
  CHECK(store->stats().dropped == 1);
  CHECK_FALSE(store->contains(key_of(0)));
  CHECK(folder.block_files().empty());
  CHECK(put(*store, 0) == KVOutcome::kDone);
  CHECK(get(*store, 0) == KVOutcome::kDone);
}

}  // namespace

TEST_CASE("a directory is as it was when opened again") {
  const TemporaryFolder folder;
  fill(folder, 10);
  const auto store = open(folder);
  CHECK(store->stats().num_blocks == 10);
  for (int32_t i = 0; i < 10; ++i) CHECK(get(*store, i) == KVOutcome::kDone);
  CHECK(get(*store, 10) == KVOutcome::kMissing);
}

TEST_CASE("a smaller store keeps the newest blocks of a directory") {
  const TemporaryFolder folder;
  fill(folder, 10);
  const auto store = open(folder, 3);
  CHECK(store->stats().num_blocks == 3);
  CHECK(store->stats().evicted == 7);
  CHECK(folder.block_files().size() == 3);
  for (int32_t i = 0; i < 10; ++i) CHECK(store->contains(key_of(i)) == (i >= 7));
}

TEST_CASE("a file cut short or grown is never delivered") {
  for (const int64_t size : {0, 1, 63, 64, 65, 1063, 1065, 5000}) {
    const TemporaryFolder folder;
    fill(folder, 1);
    std::filesystem::resize_file(folder.block_files()[0], size);
    check_dropped(folder);
  }
}

TEST_CASE("one flipped bit anywhere is found") {
  for (std::streamoff byte = 0; byte < 1064; byte += byte < 64 ? 1 : 37) {
    const TemporaryFolder folder;
    fill(folder, 1);
    flip_bit(folder.block_files()[0], byte, static_cast<int>(byte % 8));
    check_dropped(folder);
  }
}

TEST_CASE("a block under another's name is found") {
  const TemporaryFolder folder;
  fill(folder, 2);
  for (const auto& path : folder.block_files()) {
    const auto name = parse_block_file_name(path.filename().native());
    REQUIRE(name);
    if (name->key == key_of(0)) std::filesystem::remove(path);
    if (name->key == key_of(1))
      std::filesystem::rename(path, folder.path() + "/" + block_file_name({5, key_of(0)}));
  }
  check_dropped(folder);
}

TEST_CASE("a file that goes away behind the store's back is a miss") {
  const TemporaryFolder folder;
  const auto store = open(folder);
  put(*store, 0);
  std::filesystem::remove(folder.block_files()[0]);
  CHECK(get(*store, 0) == KVOutcome::kMissing);
  CHECK(get(*store, 0) == KVOutcome::kMissing);
  CHECK(store->stats().dropped == 1);
}

TEST_CASE("unfinished and foreign files are left out") {
  const TemporaryFolder folder;
  fill(folder, 1);
  std::ofstream(folder.path() + "/unfinished-3") << "half a block";
  std::ofstream(folder.path() + "/notes.txt") << "not ours";
  std::ofstream(folder.path() + "/0-0.kv") << "no name of ours";
  const auto store = open(folder);
  CHECK(store->stats().num_blocks == 1);
  CHECK(get(*store, 0) == KVOutcome::kDone);
  CHECK(folder.unfinished_files().empty());
  CHECK(std::filesystem::exists(folder.path() + "/notes.txt"));
}

TEST_CASE("of two files of one key the newer one stays") {
  const TemporaryFolder folder;
  fill(folder, 1);
  const auto file = folder.block_files()[0];
  std::filesystem::copy_file(file, folder.path() + "/" + block_file_name({9, key_of(0)}));
  const auto store = open(folder);
  CHECK(store->stats().num_blocks == 1);
  CHECK_FALSE(std::filesystem::exists(file));
  CHECK(get(*store, 0) == KVOutcome::kDone);
}

TEST_CASE("file names: there and back, and nothing else") {
  const BlockFileName name{0x0123456789abcdef, key_of(3)};
  const std::string text = block_file_name(name);
  const auto parsed = parse_block_file_name(text);
  REQUIRE(parsed);
  CHECK(parsed->age == name.age);
  CHECK(parsed->key == name.key);
  for (size_t i = 0; i < text.size(); ++i) {
    std::string wrong = text;
    wrong[i] = 'X';
    CHECK_FALSE(parse_block_file_name(wrong));
  }
  CHECK_FALSE(parse_block_file_name(text + "x"));
  CHECK_FALSE(parse_block_file_name(""));
}

TEST_CASE("directories of another shape, or in use, are refused and stay as they are") {
  const TemporaryFolder folder;
  fill(folder, 2);
  CHECK_THROWS_WITH_AS(open(folder, 10, 999), doctest::Contains("block_bytes 999"),
                       InvalidArgument);
  CHECK_THROWS_WITH_AS(open(folder, 10, 1000, "other model"),
                       doctest::Contains("identity other model"), InvalidArgument);
  const auto store = open(folder);
  CHECK(store->stats().num_blocks == 2);
  CHECK_THROWS_WITH_AS(open(folder), doctest::Contains("no other store has open"), InvalidArgument);
  CHECK_THROWS_AS(open_file_store({"/proc/nowhere", 1000, 1000, ""}), std::system_error);
}

// A child process whose files may not grow beyond a limit: writes fail as on a full disk.
TEST_CASE("a write that fails leaves no trace, and the store goes on") {
  const TemporaryFolder folder;
  fill(folder, 1);
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const auto store = open(folder);
    const rlimit limit{500, RLIM_INFINITY};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    bool good = put(*store, 1) == KVOutcome::kFailed && !store->contains(key_of(1));
    good = good && store->stats().failed == 1 && get(*store, 0) == KVOutcome::kDone;
    const rlimit no_limit{RLIM_INFINITY, RLIM_INFINITY};
    ::setrlimit(RLIMIT_FSIZE, &no_limit);
    good = good && put(*store, 1) == KVOutcome::kDone && get(*store, 1) == KVOutcome::kDone;
    ::_exit(good ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(folder.block_files().size() == 2);
}

TEST_CASE("a file that can't be opened just now is a miss, and stays") {
  const TemporaryFolder folder;
  fill(folder, 1);
  const auto store = open(folder);
  rlimit before;
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  const rlimit none{0, before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  const KVOutcome outcome = get(*store, 0);
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(outcome == KVOutcome::kMissing);
  CHECK(get(*store, 0) == KVOutcome::kDone);
  CHECK(store->stats().dropped == 0);
}

namespace {

constexpr int32_t kGroup = 4;  // puts that run at once

// Puts blocks for ever, group by group, and reports the last of each group that has completed.
[[noreturn]] void write_blocks(const TemporaryFolder& folder, int32_t first, int report) {
  const auto store = open(folder, 100000, 50000);
  for (;; first += kGroup) {
    std::vector<std::vector<std::byte>> payloads;
    for (int32_t i = first; i < first + kGroup; ++i) {
      payloads.push_back(payload_of(i, store->block_bytes()));
      if (!store->put(key_of(i), payloads.back())) ::_exit(1);
    }
    store->drain();
    const int32_t last = first + kGroup - 1;
    if (store->stats().failed > 0 || ::write(report, &last, sizeof last) != sizeof last) ::_exit(1);
  }
}

// Runs write_blocks() until `count` groups are reported and a while longer, then kills it. Returns
// the last block reported.
int32_t kill_writer(const TemporaryFolder& folder, int32_t first, int count, int microseconds) {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const pid_t child = ::fork();
  if (child == 0) write_blocks(folder, first, ends[1]);
  ::close(ends[1]);
  int32_t last = -1;
  for (int n = 0; n < count; ++n) REQUIRE(::read(ends[0], &last, sizeof last) == sizeof last);
  ::usleep(static_cast<useconds_t>(microseconds));
  ::kill(child, SIGKILL);
  while (::read(ends[0], &last, sizeof last) == sizeof last) {
  }
  ::close(ends[0]);
  ::waitpid(child, nullptr, 0);
  return last;
}

}  // namespace

TEST_CASE("a process killed at any moment loses no block whose put has completed") {
  const TemporaryFolder folder;
  int32_t num_written = 0;
  for (int round = 0; round < 12; ++round) {
    const int32_t last = kill_writer(folder, num_written, 1 + round % 4, 173 * round);
    REQUIRE(last >= num_written);
    const auto store = open(folder, 100000, 50000);
    for (int32_t i = num_written; i <= last; ++i) CHECK(get(*store, i) == KVOutcome::kDone);
    // One more group may have been under way; of it no wrong bytes, and nothing behind it.
    for (int32_t i = last + 1; i <= last + kGroup; ++i) CHECK(get(*store, i) != KVOutcome::kFailed);
    CHECK(get(*store, last + kGroup + 1) == KVOutcome::kMissing);
    CHECK(store->stats().dropped == 0);
    CHECK(folder.unfinished_files().empty());
    num_written = last + kGroup + 1;
  }
}
