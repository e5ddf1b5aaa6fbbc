// SPDX-License-Identifier: Apache-2.0
// CallRecorder and replay(): both reduce the result of a call by the same functions.
#include <array>

#include "quire/call_log.h"
#include "quire/error.h"

namespace quire {
namespace {

void add_counts(const KVCacheManager& manager, ResultCheck& check) {
  const KVCacheStats stats = manager.stats();
  const std::array<int32_t, 3> counts = {stats.free_blocks, stats.used_blocks, stats.cached_blocks};
  check.add(counts);
}

uint32_t check_born(const KVCacheManager& manager, SequenceId seq) {
  ResultCheck check;
  add_counts(manager, check);
  const int64_t num_cached = manager.num_cached_tokens(seq);
  check.add(std::span(&num_cached, 1));
  check.add(manager.block_table(seq));
  return check.value();
}

uint32_t check_step(const KVCacheManager& manager, const StepBatch* batch) {
  ResultCheck check;
  add_counts(manager, check);
  if (batch) {
    check.add(std::span<const int64_t>(batch->slot_mapping().data(), batch->slot_mapping().size()));
    check.add(std::span<const int32_t>(batch->seq_lens().data(), batch->seq_lens().size()));
    check.add(std::span<const int32_t>(batch->copies().data(), batch->copies().size()));
  }
  return check.value();
}

// The tables of sequences that are about to be freed; those not alive have none.
template <class Seqs>
ResultCheck tables_of(const KVCacheManager& manager, const Seqs& seqs) {
  ResultCheck check;
  for (SequenceId seq : seqs) {
    try {
      check.add(manager.block_table(seq));
    } catch (const InvalidArgument&) {
    }
  }
  return check;
}

// Tables come before the call, counts after it.
uint32_t check_free(const KVCacheManager& manager, ResultCheck tables) {
  add_counts(manager, tables);
  return tables.value();
}

uint32_t check_counts(const KVCacheManager& manager) {
  ResultCheck check;
  add_counts(manager, check);
  return check.value();
}

}  // namespace

CallRecorder::CallRecorder(const CallLogConfig& config, std::ostream& log)
    : manager_(config.num_blocks, config.block_size, config.prefix_caching, config.async_depth),
      writer_(log, config) {}

std::vector<int64_t> CallRecorder::births_of(std::span<const SequenceId> seqs) const {
  std::vector<int64_t> births;
  for (SequenceId seq : seqs) {
    const auto it = births_.find(seq.value);
    births.push_back(it == births_.end() ? -1 : it->second);
  }
  return births;
}

// Writes the call once it has run; `run` does it and fills call.check and, if need be, outcome.
template <class Run>
void CallRecorder::record(LoggedCall& call, Run run) {
  try {
    run();
  } catch (const InvalidArgument&) {
    call.outcome = LoggedCall::kRefused;
    call.check = check_counts(manager_);
    writer_.write(call);
    throw;
  }
  writer_.write(call);
}

SequenceId CallRecorder::create(std::span<const int32_t> token_ids, Salt salt) {
  LoggedCall call{.operation = LoggedCall::kCreate};
  call.values.assign(token_ids.begin(), token_ids.end());
  if (salt) call.salt = std::string(*salt);
  SequenceId seq;
  record(call, [&] {
    seq = manager_.create(token_ids, salt);
    births_[seq.value] = num_births_++;
    call.check = check_born(manager_, seq);
  });
  return seq;
}

const StepBatch* CallRecorder::step(std::span<const SequenceId> seqs,
                                    std::span<const int32_t> num_new_tokens) {
  LoggedCall call{.operation = LoggedCall::kStep, .seqs = births_of(seqs)};
  call.values.assign(num_new_tokens.begin(), num_new_tokens.end());
  const StepBatch* batch = nullptr;
  record(call, [&] {
    batch = manager_.step(seqs, num_new_tokens);
    if (!batch) call.outcome = LoggedCall::kOutOfBlocks;
    call.check = check_step(manager_, batch);
  });
  return batch;
}

void CallRecorder::commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled,
                          std::span<const int32_t> num_sampled) {
  LoggedCall call{.operation = LoggedCall::kCommit, .seqs = births_of(seqs)};
  call.values.assign(sampled.begin(), sampled.end());
  call.counts.assign(num_sampled.begin(), num_sampled.end());
  record(call, [&] {
    manager_.commit(seqs, sampled, num_sampled);
    call.check = check_counts(manager_);
  });
}

SequenceId CallRecorder::fork(SequenceId parent) {
  LoggedCall call{.operation = LoggedCall::kFork, .seqs = births_of({&parent, 1})};
  SequenceId seq;
  record(call, [&] {
    seq = manager_.fork(parent);
    births_[seq.value] = num_births_++;
    call.check = check_born(manager_, seq);
  });
  return seq;
}

void CallRecorder::truncate(SequenceId seq, int64_t num_tokens) {
  LoggedCall call{.operation = LoggedCall::kTruncate, .seqs = births_of({&seq, 1})};
  call.number = num_tokens;
  record(call, [&] {
    manager_.truncate(seq, num_tokens);
    call.check = check_counts(manager_);
  });
}

void CallRecorder::free(std::span<const SequenceId> seqs) {
  LoggedCall call{.operation = LoggedCall::kFree, .seqs = births_of(seqs)};
  record(call, [&] {
    ResultCheck tables = tables_of(manager_, seqs);
    manager_.free(seqs);
    for (SequenceId seq : seqs) births_.erase(seq.value);
    call.check = check_free(manager_, std::move(tables));
  });
}

void CallRecorder::retire(int64_t ticket) {
  LoggedCall call{.operation = LoggedCall::kRetire, .number = ticket};
  record(call, [&] {
    manager_.retire(ticket);
    call.check = check_counts(manager_);
  });
}

namespace {

// A new manager that runs logged calls.
class Replayer {
 public:
  explicit Replayer(const CallLogConfig& config)
      : manager_(config.num_blocks, config.block_size, config.prefix_caching, config.async_depth) {}

  // What the call gives now: outcome and check, the rest as in `logged`.
  LoggedCall run(const LoggedCall& logged) {
    LoggedCall call = logged;
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
        born_.push_back(manager_.create(call.values, call.salt));
        return check_born(manager_, born_.back());
      case LoggedCall::kFork:
        born_.push_back(manager_.fork(only_seq()));
        return check_born(manager_, born_.back());
      case LoggedCall::kStep: {
        const StepBatch* batch = manager_.step(seqs_, call.values);
        if (!batch) outcome = LoggedCall::kOutOfBlocks;
        return check_step(manager_, batch);
      }
      case LoggedCall::kCommit:
        manager_.commit(seqs_, call.values, call.counts);
        break;
      case LoggedCall::kTruncate:
        manager_.truncate(only_seq(), call.number);
        break;
      case LoggedCall::kFree: {
        ResultCheck tables = tables_of(manager_, seqs_);
        manager_.free(seqs_);
        return check_free(manager_, std::move(tables));
      }
      case LoggedCall::kRetire:
        manager_.retire(call.number);
        break;
    }
    return check_counts(manager_);
  }

  KVCacheManager manager_;
  std::vector<SequenceId> born_;  // by number of birth
  std::vector<SequenceId> seqs_;  // of the call
};

std::string describe(const LoggedCall& call) {
  static constexpr const char* kOutcomes[] = {"done", "out of blocks", "refused"};
  return concat(kOutcomes[call.outcome], " (check ", call.check, ")");
}

constexpr const char* kOperations[] = {"create",   "step", "commit", "fork",
                                       "truncate", "free", "retire"};

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
