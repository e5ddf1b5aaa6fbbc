// SPDX-License-Identifier: Apache-2.0
// A recorded run replays call by call; what differs, is cut short or is no log is told apart.
#include <doctest/doctest.h>

#include <random>
#include <sstream>

#include "kv_traffic.h"
#include "quire/call_log.h"

using namespace quire;

namespace {

struct Random {
  std::mt19937 engine;
  uint32_t next() { return static_cast<uint32_t>(engine()); }
};

std::string record_traffic(const kv_traffic::Shape& shape, uint32_t seed, int num_calls) {
  std::ostringstream log;
  CallRecorder recorder(
      {shape.num_blocks, shape.block_size, shape.prefix_caching, shape.async_depth}, log);
  Random random{std::mt19937(seed)};
  kv_traffic::Traffic traffic(recorder, recorder.manager(), shape, random);
  for (int n = 0; n < num_calls; ++n) traffic.call();
  if (num_calls > 1000) CHECK(traffic.num_refused() > 0);
  return log.str();
}

std::span<const std::byte> bytes_of(const std::string& log) {
  return std::as_bytes(std::span(log));
}

std::vector<LoggedCall> calls_of(const std::string& log) {
  CallLogReader reader(bytes_of(log));
  std::vector<LoggedCall> calls;
  for (LoggedCall call; reader.read(call);) calls.push_back(call);
  return calls;
}

const CallLogConfig kSmall{8, 4};

std::string rewrite(const CallLogConfig& config, const std::vector<LoggedCall>& calls) {
  std::ostringstream log;
  CallLogWriter writer(log, config);
  for (const LoggedCall& call : calls) writer.write(call);
  return log.str();
}

}  // namespace

TEST_CASE("random traffic replays without a difference") {
  const kv_traffic::Shape shapes[] = {
      {40, 4, true, 0, 12, 60}, {40, 4, false, 0, 12, 60}, {64, 8, true, 2, 12, 100}};
  for (const auto& shape : shapes)
    for (uint32_t seed = 0; seed < 3; ++seed) {
      const std::string log = record_traffic(shape, seed, 1500);
      const ReplayReport report = replay(bytes_of(log));
      CHECK_MESSAGE(!report.difference, *report.difference);
      CHECK(report.num_calls == static_cast<int64_t>(calls_of(log).size()));
      CHECK(report.num_calls > 1500);
      for (auto operation : {LoggedCall::kCreate, LoggedCall::kStep, LoggedCall::kCommit,
                             LoggedCall::kFork, LoggedCall::kTruncate, LoggedCall::kFree}) {
        int count = 0;
        for (const LoggedCall& call : calls_of(log)) count += call.operation == operation;
        CHECK(count > 20);
      }
    }
}

TEST_CASE("written and read again, a call is the same") {
  std::vector<LoggedCall> calls(3);
  calls[0] = {
      LoggedCall::kCreate, LoggedCall::kRefused, {}, {1, -2, INT32_MIN, INT32_MAX}, {}, "a salt", 0,
      0xfedcba98};
  calls[1] = {LoggedCall::kCommit, LoggedCall::kDone, {5, 3, -1, 1LL << 40}, {}, {0, 2}, {}, 0, 1};
  calls[2] = {LoggedCall::kTruncate, LoggedCall::kDone, {0}, {}, {}, "", -77, 2};
  const std::string log = rewrite(kSmall, calls);
  const std::vector<LoggedCall> read = calls_of(log);
  REQUIRE(read.size() == 3);
  for (int i = 0; i < 3; ++i) {
    CHECK(read[i].operation == calls[i].operation);
    CHECK(read[i].outcome == calls[i].outcome);
    CHECK(read[i].seqs == calls[i].seqs);
    CHECK(read[i].values == calls[i].values);
    CHECK(read[i].counts == calls[i].counts);
    CHECK(read[i].salt == calls[i].salt);
    CHECK(read[i].number == calls[i].number);
    CHECK(read[i].check == calls[i].check);
  }
}

TEST_CASE("another result is found at its call") {
  const kv_traffic::Shape shape{40, 4, true, 0, 12, 60};
  const CallLogConfig config{40, 4};
  const std::vector<LoggedCall> calls = calls_of(record_traffic(shape, 1, 300));
  for (const size_t at : {size_t{0}, calls.size() / 2, calls.size() - 1}) {
    auto changed = calls;
    changed[at].check ^= 1;
    const ReplayReport report = replay(bytes_of(rewrite(config, changed)));
    REQUIRE(report.difference);
    CHECK(report.num_calls == static_cast<int64_t>(at));
    changed[at] = calls[at];
    changed[at].outcome = LoggedCall::kOutOfBlocks;
    if (calls[at].outcome != LoggedCall::kOutOfBlocks)
      CHECK(replay(bytes_of(rewrite(config, changed))).difference.has_value());
  }
  // A pool of another size hands out other blocks sooner or later.
  CHECK(replay(bytes_of(rewrite({20, 4}, calls))).difference.has_value());
}

TEST_CASE("a log that ends in the middle of a call replays up to there") {
  const std::string log = record_traffic({40, 4, true, 0, 12, 60}, 2, 60);
  int64_t last = 0;
  for (size_t size = 30; size <= log.size(); size += 7) {
    const ReplayReport report = replay(bytes_of(log.substr(0, size)));
    CHECK_FALSE(report.difference);
    CHECK(report.num_calls >= last);
    last = report.num_calls;
  }
}

TEST_CASE("random bytes behind a good beginning do no harm") {
  const std::string log = record_traffic({40, 4, true, 0, 12, 60}, 3, 40);
  std::mt19937 random(5);
  for (int n = 0; n < 300; ++n) {
    std::string damaged = log;
    for (int i = 0; i < 4; ++i)
      damaged[20 + random() % (log.size() - 20)] = static_cast<char>(random());
    replay(bytes_of(damaged));
  }
}

TEST_CASE("what is no log is refused") {
  CHECK_THROWS_WITH_AS(replay({}), doctest::Contains("expected a call log of version 1"),
                       InvalidArgument);
  std::string other = rewrite(kSmall, {});
  other[8] = 2;
  CHECK_THROWS_AS(replay(bytes_of(other)), InvalidArgument);
  CHECK_THROWS_AS(replay(bytes_of(rewrite(kSmall, {}).substr(0, 10))), InvalidArgument);
  CHECK(replay(bytes_of(rewrite(kSmall, {}))).num_calls == 0);
}
