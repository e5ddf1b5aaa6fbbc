// SPDX-License-Identifier: Apache-2.0
// replay(): the calls of a log on a new manager.
#include <cstring>
#include <memory>

#include "call_log/results.h"
#include "quire/error.h"

namespace quire {

using namespace call_log;

namespace {

// What stores hold while a logged fetch() runs: the blocks that it loaded, and no others.
struct LoggedLoads {
  std::span<const int32_t> tiers, heads;  // of keys, 2 a block
  bool is_everything = false;             // each block, in whatever store is asked first
};

// A store of one tier that answers as the log says, and never gets or gives a block.
class LoggedStore final : public KVStore {
 public:
  LoggedStore(CacheTier tier, LoggedLoads& loads) : tier_(tier), loads_(loads) {}

  bool contains(const ChainKey& key) const noexcept override {
    if (loads_.is_everything) return true;
    for (size_t i = 0; i < loads_.tiers.size() && 2 * i + 1 < loads_.heads.size(); ++i)
      if (loads_.tiers[i] == static_cast<int32_t>(tier_) &&
          std::memcmp(key.bytes.data(), &loads_.heads[2 * i], 2 * sizeof(int32_t)) == 0)
        return true;
    return false;
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
  LoggedLoads& loads_;
};

// A new manager that runs logged calls.
class Replayer {
 public:
  explicit Replayer(const CallLogConfig& config)
      : manager_(config.num_blocks, config.block_size, config.prefix_caching, config.async_depth,
                 config.options) {}

  // What the call gives now: outcome and check, the rest as in `logged`.
  LoggedCall run(const LoggedCall& logged) {
    LoggedCall call = logged;
    loads_ = {};
    // A fetch() that ran out of blocks does not say what it had found. With all that could be found
    // it lacks at least as many blocks, and then changes nothing either; but of several groups it
    // may lack fewer, as those may read less behind more. That it changed nothing is enough then.
    const bool lacked = logged.outcome == LoggedCall::kOutOfBlocks;
    if (logged.operation == LoggedCall::kFetch) {
      loads_ = {logged.values, logged.counts, lacked};
      if (lacked && manager_.num_groups() > 1) {
        call.check = check_counts(manager_);
        return call;
      }
    }
    call.outcome = LoggedCall::kDone;
    seqs_.clear();
    for (int64_t birth : call.seqs) seqs_.push_back(born(birth));
    try {
      call.check = run(call, call.outcome);
    } catch (const InvalidArgument&) {
      call.outcome = LoggedCall::kRefused;
      call.check = check_counts(manager_);
    }
    return call;
  }

  const KVCacheManager& manager() const { return manager_; }

 private:
  SequenceId born(int64_t birth) const {
    const bool is_known = birth >= 0 && birth < static_cast<int64_t>(born_.size());
    return is_known ? born_[static_cast<size_t>(birth)] : SequenceId{};
  }
  SequenceId only_seq() const { return seqs_.size() == 1 ? seqs_[0] : SequenceId{}; }

  uint32_t run(const LoggedCall& call, LoggedCall::Outcome& outcome) {
    switch (call.operation) {
      case LoggedCall::kCreate:
        return check_birth(manager_.create(call.values, call.salt, retention_of(call.counts)));
      case LoggedCall::kOpen:
        return check_birth(manager_.open(call.values, call.salt, retention_of(call.counts)));
      case LoggedCall::kAttach: {
        const SequenceId seq = only_seq();
        manager_.attach(seq);
        return check_born(manager_, {&seq, 1});
      }
      case LoggedCall::kFork:
        return fork(call.counts.size());
      case LoggedCall::kPin:
      case LoggedCall::kUnpin:
        return check_number(manager_, change_pins(call));
      case LoggedCall::kClearCache:
        return check_number(manager_, manager_.clear_cache());
      case LoggedCall::kSetTime:
        manager_.set_time(call.number);
        break;
      case LoggedCall::kStep: {
        QUIRE_CHECK_ARG(call.number == static_cast<int32_t>(call.number),
                        "replay: step: lookahead: expected 32 bits, got ", call.number);
        const StepBatch* batch =
            manager_.step(seqs_, call.values, static_cast<int32_t>(call.number));
        if (!batch) outcome = LoggedCall::kOutOfBlocks;
        return check_step(manager_, seqs_, batch);
      }
      case LoggedCall::kCommit:
        manager_.commit(seqs_, call.values, call.counts);
        break;
      case LoggedCall::kTruncate:
        manager_.truncate(only_seq(), call.number);
        break;
      case LoggedCall::kFree:
      case LoggedCall::kDetach: {
        ResultCheck tables = tables_of(manager_, seqs_);
        if (call.operation == LoggedCall::kFree)
          manager_.free(seqs_);
        else
          manager_.detach(only_seq());
        return check_free(manager_, std::move(tables));
      }
      case LoggedCall::kRetire:
        manager_.retire(call.number);
        break;
      case LoggedCall::kAttachStore:
        attach_store(call.number);
        break;
      case LoggedCall::kFetch: {
        const auto loads = manager_.fetch(only_seq());
        if (!loads) outcome = LoggedCall::kOutOfBlocks;
        return check_loads(manager_, loads);
      }
      case LoggedCall::kFetched: {
        const bool is_count = call.number == static_cast<int32_t>(call.number);
        manager_.fetched(only_seq(), is_count ? static_cast<int32_t>(call.number) : -1);
        break;
      }
      case LoggedCall::kSwapOut:
      case LoggedCall::kSwapIn: {
        const auto pairs = call.operation == LoggedCall::kSwapOut ? manager_.swap_out(only_seq())
                                                                  : manager_.swap_in(only_seq());
        if (!pairs) outcome = LoggedCall::kOutOfBlocks;
        return check_pairs(manager_, pairs);
      }
    }
    return check_counts(manager_);
  }

  uint32_t check_birth(SequenceId seq) {
    born_.push_back(seq);
    return check_born(manager_, {&seq, 1});
  }

  uint32_t fork(size_t count) {
    std::vector<SequenceId> children(count);
    manager_.fork(only_seq(), children);
    born_.insert(born_.end(), children.begin(), children.end());
    return check_born(manager_, children);
  }

  int64_t change_pins(const LoggedCall& call) {
    const bool pins = call.operation == LoggedCall::kPin;
    if (!call.seqs.empty()) return pins ? manager_.pin(only_seq()) : manager_.unpin(only_seq());
    return pins ? manager_.pin(call.values, call.salt) : manager_.unpin(call.values, call.salt);
  }

  void attach_store(int64_t tier) {
    QUIRE_CHECK_ARG(tier >= 0 && tier <= static_cast<int64_t>(CacheTier::kFile),
                    "replay: attach_store: tier: expected one of CacheTier, got ", tier);
    auto store = std::make_unique<LoggedStore>(static_cast<CacheTier>(tier), loads_);
    manager_.attach_store(*store);
    stores_.push_back(std::move(store));
  }

  LoggedLoads loads_;
  std::vector<std::unique_ptr<LoggedStore>> stores_;  // outlive the manager
  KVCacheManager manager_;
  std::vector<SequenceId> born_;  // by number of birth
  std::vector<SequenceId> seqs_;  // of the call
};

std::string describe(const LoggedCall& call) {
  static constexpr const char* kOutcomes[] = {"done", "out of blocks", "refused"};
  return concat(kOutcomes[call.outcome], " (check ", call.check, ")");
}

constexpr const char* kOperations[] = {"create",   "step",    "commit",       "fork",    "truncate",
                                       "free",     "retire",  "attach_store", "fetch",   "fetched",
                                       "swap_out", "swap_in", "pin",          "unpin",   "open",
                                       "attach",   "detach",  "clear_cache",  "set_time"};

}  // namespace

ReplayReport replay(std::span<const std::byte> log) {
  CallLogReader reader(log);
  Replayer replayer(reader.config());
  ReplayReport report;
  for (LoggedCall logged; reader.read(logged); ++report.num_calls) {
    const LoggedCall now = replayer.run(logged);
    if (now.outcome == logged.outcome && now.check == logged.check) continue;
    report.difference = concat("call ", report.num_calls, ", ", kOperations[logged.operation],
                               ": expected ", describe(logged), ", got ", describe(now));
    break;
  }
  replayer.manager().validate();
  return report;
}

}  // namespace quire
