// SPDX-License-Identifier: Apache-2.0
// A recorded run replays call by call; what differs, is cut short or is no log is told apart.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <sstream>
#include <utility>

#include "kv_traffic.h"
#include "quire/call_log.h"

using namespace quire;

namespace {

struct Random {
  std::mt19937 engine;
  uint32_t next() { return static_cast<uint32_t>(engine()); }
};

std::string record_traffic(const kv_traffic::Shape& shape, uint32_t seed, int num_calls,
                           const KVCacheOptions& options = {}) {
  std::ostringstream log;
  CallRecorder recorder(
      {shape.num_blocks, shape.block_size, shape.prefix_caching, shape.async_depth, options}, log);
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

using Kind = LayerGroup::Kind;

// A store that holds some two of three keys, others after every change. It gets and gives nothing.
class ChangingStore final : public KVStore {
 public:
  explicit ChangingStore(CacheTier tier) : tier_(tier) {}
  void change() { ++epoch_; }
  bool contains(const ChainKey& key) const noexcept override {
    return (key.bytes[0] + epoch_) % 3 > 0;
  }
  CacheTier tier() const override { return tier_; }
  std::shared_ptr<KVTicket> put(const ChainKey&, std::span<const std::byte>, OnDone) override {
    return nullptr;
  }
  std::shared_ptr<KVTicket> get(const ChainKey&, std::span<std::byte>, OnDone) override {
    return nullptr;
  }
  bool erase(const ChainKey&) override { return false; }
  void drain() override {}
  size_t block_bytes() const override { return 0; }
  KVStoreStats stats() const override { return {}; }

 private:
  CacheTier tier_;
  uint32_t epoch_ = 0;
};

// Fetches that end at once or after some other calls, with any number of their blocks, between
// the calls of kv_traffic; all of it by CallRecorder.
std::string record_fetches(const CallLogConfig& config, const kv_traffic::Shape& shape,
                           uint32_t seed, int num_calls) {
  std::ostringstream log;
  ChangingStore host(CacheTier::kHost), file(CacheTier::kFile);
  CallRecorder recorder(config, log);
  recorder.attach_store(host);
  recorder.attach_store(file);
  CHECK_THROWS_AS(recorder.attach_store(file), InvalidArgument);
  Random random{std::mt19937(seed)};
  kv_traffic::Traffic traffic(recorder, recorder.manager(), shape, random);
  for (int n = 0; n < num_calls; ++n) {
    traffic.call();
    if (traffic.live().empty() || random.next() % 2 > 0) continue;
    if (random.next() % 2 > 0) (random.next() % 2 > 0 ? host : file).change();
    const SequenceId seq = traffic.live()[random.next() % traffic.live().size()];
    try {
      const auto loads = recorder.fetch(seq);
      if (!loads || loads->empty()) continue;
      while (random.next() % 4 == 0) traffic.call();
      const auto most = static_cast<int32_t>(loads->size());
      CHECK_THROWS_AS(recorder.fetched(seq, most + 1), InvalidArgument);
      recorder.fetched(seq, static_cast<int32_t>(random.next() % (most + 1)));
      recorder.take_offloads();
      // One that the traffic tried to free meanwhile was not freed, and is forgotten there.
      if (std::ranges::find(traffic.live(), seq) == traffic.live().end()) recorder.free({&seq, 1});
    } catch (const InvalidArgument&) {  // a step is under way, or it is swapped out
    }
  }
  recorder.manager().validate();
  return log.str();
}

CallLogConfig config_of(const kv_traffic::Shape& shape, KVCacheOptions options) {
  return {shape.num_blocks, shape.block_size, shape.prefix_caching, shape.async_depth,
          std::move(options)};
}

std::string rewrite(const CallLogConfig& config, const std::vector<LoggedCall>& calls) {
  std::ostringstream log;
  CallLogWriter writer(log, config);
  for (const LoggedCall& call : calls) writer.write(call);
  return log.str();
}

}  // namespace

TEST_CASE("random traffic replays without a difference") {
  int num_attached = 0;
  const kv_traffic::Shape shapes[] = {{40, 4, true, 0, 12, 60, 1e-5},
                                      {40, 4, false, 0, 12, 60, 1e-6},
                                      {64, 8, true, 2, 12, 100, 1e-4}};
  for (const auto& shape : shapes)
    for (uint32_t seed = 0; seed < 3; ++seed) {
      const std::string log = record_traffic(shape, seed, 1500);
      const ReplayReport report = replay(bytes_of(log));
      CHECK_MESSAGE(!report.difference, *report.difference);
      CHECK(report.num_calls == static_cast<int64_t>(calls_of(log).size()));
      CHECK(report.num_calls > 1500);
      int counts[32] = {};
      for (const LoggedCall& call : calls_of(log)) ++counts[call.operation];
      for (auto operation :
           {LoggedCall::kCreate, LoggedCall::kStep, LoggedCall::kCommit, LoggedCall::kFork,
            LoggedCall::kTruncate, LoggedCall::kFree, LoggedCall::kPin, LoggedCall::kUnpin,
            LoggedCall::kOpen, LoggedCall::kDetach, LoggedCall::kSetTime})
        if (shape.prefix_caching || operation != LoggedCall::kUnpin)  // of nothing else
          CHECK_MESSAGE(counts[operation] > 5, operation);
      num_attached += counts[LoggedCall::kAttach];
      CHECK(counts[LoggedCall::kClearCache] > 0);
    }
  CHECK(num_attached > 0);
}

TEST_CASE("swaps, fetches and their options replay without stores") {
  const kv_traffic::Shape shapes[] = {{12, 4, true, 0, 12, 60}, {12, 4, true, 2, 12, 60}};
  int counts[32][3] = {};
  for (const auto& shape : shapes)
    for (const auto eviction : {Eviction::kLru, Eviction::kReuseLru}) {
      const CallLogConfig config = config_of(shape, {eviction, 16, 5, {}});
      const std::string log = record_fetches(config, shape, 7, 4000);
      const ReplayReport report = replay(bytes_of(log));
      CHECK_MESSAGE(!report.difference, *report.difference);
      const std::vector<LoggedCall> calls = calls_of(log);
      CHECK(report.num_calls == static_cast<int64_t>(calls.size()));
      bool is_far = false;
      for (const LoggedCall& call : calls) {
        const bool is_empty_fetch = call.operation == LoggedCall::kFetch && call.values.empty();
        counts[call.operation][call.outcome] += call.outcome > 0 || !is_empty_fetch;
        if (call.operation == LoggedCall::kFetch)
          is_far |= std::ranges::count(call.values, static_cast<int32_t>(CacheTier::kFile)) > 0;
      }
      CHECK(is_far);
    }
  for (auto operation : {LoggedCall::kFetch, LoggedCall::kSwapOut, LoggedCall::kSwapIn}) {
    CAPTURE(operation);
    CHECK(counts[operation][LoggedCall::kDone] > 20);
    CHECK(counts[operation][LoggedCall::kOutOfBlocks] > 0);
  }
  CHECK(counts[LoggedCall::kFetched][LoggedCall::kDone] > 100);
  CHECK(counts[LoggedCall::kFetched][LoggedCall::kRefused] > 100);
  CHECK(counts[LoggedCall::kAttachStore][LoggedCall::kRefused] == 4);
}

TEST_CASE("a fetch that finds other blocks, or fewer, is a difference") {
  const kv_traffic::Shape shape{24, 4, true, 0, 12, 60};
  const CallLogConfig config = config_of(shape, {.num_host_blocks = 10});
  const std::vector<LoggedCall> calls = calls_of(record_fetches(config, shape, 2, 400));
  const auto found = std::ranges::find_if(calls, [](const LoggedCall& call) {
    return call.operation == LoggedCall::kFetch && call.values.size() > 1;
  });
  REQUIRE(found != calls.end());
  const auto at = found - calls.begin();
  auto changed = calls;
  changed[at].values.pop_back();
  CHECK(replay(bytes_of(rewrite(config, changed))).num_calls == at);
  changed[at].values = {77};  // no tier
  CHECK(replay(bytes_of(rewrite(config, changed))).num_calls == at);
  // A store fewer, and what was of its tier is not found.
  for (int tier = 0; tier < 2; ++tier) {
    changed = calls;
    changed.erase(changed.begin() + tier);
    CHECK(replay(bytes_of(rewrite(config, changed))).difference.has_value());
  }
  // Fewer host blocks.
  CallLogConfig other = config;
  other.options.num_host_blocks = 3;
  CHECK(replay(bytes_of(rewrite(other, calls))).difference.has_value());
  // Counts and tiers beyond all bounds are refused like by the manager.
  changed = {{.operation = LoggedCall::kAttachStore, .number = 1LL << 40},
             {.operation = LoggedCall::kFetched, .number = 1LL << 40}};
  const ReplayReport report = replay(bytes_of(rewrite(config, changed)));
  CHECK(report.num_calls == 0);
  REQUIRE(report.difference);
  CHECK(report.difference->starts_with("call 0, attach_store: expected done"));
}

TEST_CASE("blocks of every layer group replay") {
  const kv_traffic::Shape shapes[] = {
      {90, 4, true, 0, 12, 60}, {90, 4, false, 0, 12, 60}, {90, 4, true, 2, 12, 60}};
  KVCacheOptions options;
  options.num_host_blocks = 12;
  options.groups = {{}, {Kind::kSlidingWindow, 6}, {Kind::kChunkedLocal, 8}, {Kind::kState, 0}};
  for (const auto& shape : shapes)
    for (uint32_t seed = 0; seed < 2; ++seed) {
      const std::string log = shape.prefix_caching
                                  ? record_fetches(config_of(shape, options), shape, seed, 1200)
                                  : record_traffic(shape, seed, 1200, options);
      const ReplayReport report = replay(bytes_of(log));
      CHECK_MESSAGE(!report.difference, *report.difference);
      CHECK(report.num_calls == static_cast<int64_t>(calls_of(log).size()));
      KVCacheOptions others = options;
      others.groups[1].size = 30;
      CHECK(replay(bytes_of(rewrite(config_of(shape, others), calls_of(log)))).difference);
    }
}

TEST_CASE("a header is read as it was written") {
  const CallLogConfig config{
      300, 16, false, 3, {Eviction::kReuseLru, 77, 1000, {{}, {Kind::kSlidingWindow, 4096}}}};
  const std::string log = rewrite(config, {});
  const CallLogConfig read = CallLogReader(bytes_of(log)).config();
  CHECK(read.num_blocks == 300);
  CHECK(read.block_size == 16);
  CHECK_FALSE(read.prefix_caching);
  CHECK(read.async_depth == 3);
  CHECK(read.options.eviction == Eviction::kReuseLru);
  CHECK(read.options.event_capacity == 77);
  CHECK(read.options.num_host_blocks == 1000);
  REQUIRE(read.options.groups.size() == 2);
  CHECK(read.options.groups[0].kind == Kind::kFull);
  CHECK(read.options.groups[1].kind == Kind::kSlidingWindow);
  CHECK(read.options.groups[1].size == 4096);
  for (size_t size = 0; size < log.size(); ++size)
    CHECK_THROWS_AS(CallLogReader(bytes_of(log.substr(0, size))), InvalidArgument);
  std::string wrong = log;
  wrong[log.size() - 3] = 2 * 4;  // of the last group: a kind behind the last one
  CHECK_THROWS_AS(CallLogReader(bytes_of(wrong)), InvalidArgument);
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
  const kv_traffic::Shape shape{24, 4, true, 0, 12, 60};
  const CallLogConfig config = config_of(shape, {.num_host_blocks = 10});
  const std::vector<LoggedCall> calls = calls_of(record_fetches(config, shape, 3, 60));
  const std::string head = rewrite(config, {}), fetches = rewrite(config, calls);
  for (int n = 0; n < 300; ++n) {
    std::string damaged = fetches;
    for (int i = 0; i < 4; ++i)
      damaged[head.size() + random() % (damaged.size() - head.size())] =
          static_cast<char>(random());
    replay(bytes_of(damaged));
  }
}

TEST_CASE("what is no log is refused") {
  CHECK_THROWS_WITH_AS(replay({}), doctest::Contains("expected a call log of version 3"),
                       InvalidArgument);
  std::string other = rewrite(kSmall, {});
  other[8] = 2;
  CHECK_THROWS_AS(replay(bytes_of(other)), InvalidArgument);
  CHECK_THROWS_AS(replay(bytes_of(rewrite(kSmall, {}).substr(0, 10))), InvalidArgument);
  CHECK(replay(bytes_of(rewrite(kSmall, {}))).num_calls == 0);
}
