// SPDX-License-Identifier: Apache-2.0
// CallRecorder: each call is run, then written with its outcome and check.
#include <chrono>
#include <new>
#include <utility>

#include "call_log/results.h"
#include "quire/error.h"

namespace quire {

using namespace call_log;

CallRecorder::CallRecorder(const CallLogConfig& config, std::ostream& log)
    : manager_(config.num_blocks, config.block_size, config.prefix_caching, config.async_depth,
               config.options),
      writer_(log, config) {}

std::vector<int64_t> CallRecorder::births_of(std::span<const SequenceId> seqs) const {
  std::vector<int64_t> births;
  for (SequenceId seq : seqs) {
    const auto it = births_.find(seq.value);
    births.push_back(it == births_.end() ? -1 : it->second);
  }
  return births;
}

// Runs the call, then writes it; `look` fills call.check and whatever else its result decides.
template <class Run, class Look>
void CallRecorder::record(LoggedCall& call, Run run, Look look) {
  if (needs_time_) {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    LoggedCall time{.operation = LoggedCall::kSetTime};
    time.number = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
    manager_.set_time(time.number);
    write(time, [&] { time.check = check_counts(manager_); });
  }
  try {
    run();
  } catch (const InvalidArgument&) {
    call.outcome = LoggedCall::kRefused;
    write(call, [&] { call.check = check_counts(manager_); });
    throw;
  }
  write(call, look);
}

// What was done stays done where there is no memory to write it.
template <class Look>
void CallRecorder::write(LoggedCall& call, Look look) {
  try {
    look();
    writer_.write(call);
  } catch (const std::bad_alloc&) {
    writer_.end();
  }
}

template <class Run>
SequenceId CallRecorder::record_birth(LoggedCall call, std::span<const int32_t> token_ids,
                                      Salt salt, const Retention& retention, Run run) {
  call.values.assign(token_ids.begin(), token_ids.end());
  call.counts = numbers_of(retention);
  if (salt) call.salt = std::string(*salt);
  needs_time_ |= retention.ttl != Retention{}.ttl;
  SequenceId seq;
  record(
      call, [&] { seq = run(); },
      [&] {
        births_[seq.value] = num_births_++;
        call.check = check_born(manager_, {&seq, 1});
      });
  return seq;
}

SequenceId CallRecorder::create(std::span<const int32_t> token_ids, Salt salt,
                                Retention retention) {
  return record_birth({.operation = LoggedCall::kCreate}, token_ids, salt, retention,
                      [&] { return manager_.create(token_ids, salt, retention); });
}

SequenceId CallRecorder::open(std::span<const int32_t> token_ids, Salt salt, Retention retention) {
  return record_birth({.operation = LoggedCall::kOpen}, token_ids, salt, retention,
                      [&] { return manager_.open(token_ids, salt, retention); });
}

void CallRecorder::attach(SequenceId seq) {
  LoggedCall call{.operation = LoggedCall::kAttach, .seqs = births_of({&seq, 1})};
  record(
      call, [&] { manager_.attach(seq); }, [&] { call.check = check_born(manager_, {&seq, 1}); });
}

void CallRecorder::detach(SequenceId seq) {
  LoggedCall call{.operation = LoggedCall::kDetach, .seqs = births_of({&seq, 1})};
  ResultCheck tables;
  record(
      call,
      [&] {
        tables = tables_of(manager_, {&seq, 1});
        manager_.detach(seq);
      },
      [&] { call.check = check_free(manager_, std::move(tables)); });
}

template <class Run>
int64_t CallRecorder::record_pins(LoggedCall call, Run run) {
  int64_t result = 0;
  record(call, [&] { result = run(); }, [&] { call.check = check_number(manager_, result); });
  return result;
}

int64_t CallRecorder::pin(std::span<const int32_t> token_ids, Salt salt) {
  LoggedCall call{.operation = LoggedCall::kPin};
  call.values.assign(token_ids.begin(), token_ids.end());
  if (salt) call.salt = std::string(*salt);
  return record_pins(std::move(call), [&] { return manager_.pin(token_ids, salt); });
}

int64_t CallRecorder::pin(SequenceId seq) {
  return record_pins({.operation = LoggedCall::kPin, .seqs = births_of({&seq, 1})},
                     [&] { return manager_.pin(seq); });
}

int64_t CallRecorder::unpin(std::span<const int32_t> token_ids, Salt salt) {
  LoggedCall call{.operation = LoggedCall::kUnpin};
  call.values.assign(token_ids.begin(), token_ids.end());
  if (salt) call.salt = std::string(*salt);
  return record_pins(std::move(call), [&] { return manager_.unpin(token_ids, salt); });
}

int64_t CallRecorder::unpin(SequenceId seq) {
  return record_pins({.operation = LoggedCall::kUnpin, .seqs = births_of({&seq, 1})},
                     [&] { return manager_.unpin(seq); });
}

int32_t CallRecorder::clear_cache() {
  return static_cast<int32_t>(
      record_pins({.operation = LoggedCall::kClearCache}, [&] { return manager_.clear_cache(); }));
}

const StepBatch* CallRecorder::step(std::span<const SequenceId> seqs,
                                    std::span<const int32_t> num_new_tokens, int32_t lookahead) {
  LoggedCall call{.operation = LoggedCall::kStep, .seqs = births_of(seqs)};
  call.values.assign(num_new_tokens.begin(), num_new_tokens.end());
  call.number = lookahead;
  const StepBatch* batch = nullptr;
  record(
      call, [&] { batch = manager_.step(seqs, num_new_tokens, lookahead); },
      [&] {
        if (!batch) call.outcome = LoggedCall::kOutOfBlocks;
        call.check = check_step(manager_, seqs, batch);
      });
  return batch;
}

void CallRecorder::commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled,
                          std::span<const int32_t> num_sampled) {
  LoggedCall call{.operation = LoggedCall::kCommit, .seqs = births_of(seqs)};
  call.values.assign(sampled.begin(), sampled.end());
  call.counts.assign(num_sampled.begin(), num_sampled.end());
  record(
      call, [&] { manager_.commit(seqs, sampled, num_sampled); },
      [&] { call.check = check_counts(manager_); });
}

SequenceId CallRecorder::fork(SequenceId parent) {
  SequenceId child;
  fork(parent, {&child, 1});
  return child;
}

void CallRecorder::fork(SequenceId parent, std::span<SequenceId> children) {
  LoggedCall call{.operation = LoggedCall::kFork, .seqs = births_of({&parent, 1})};
  call.counts.resize(children.size());
  record(
      call, [&] { manager_.fork(parent, children); },
      [&] {
        for (SequenceId child : children) births_[child.value] = num_births_++;
        call.check = check_born(manager_, children);
      });
}

void CallRecorder::truncate(SequenceId seq, int64_t num_tokens) {
  LoggedCall call{.operation = LoggedCall::kTruncate, .seqs = births_of({&seq, 1})};
  call.number = num_tokens;
  record(
      call, [&] { manager_.truncate(seq, num_tokens); },
      [&] { call.check = check_counts(manager_); });
}

void CallRecorder::free(std::span<const SequenceId> seqs) {
  LoggedCall call{.operation = LoggedCall::kFree, .seqs = births_of(seqs)};
  ResultCheck tables;
  record(
      call,
      [&] {
        tables = tables_of(manager_, seqs);
        manager_.free(seqs);
      },
      [&] {
        for (SequenceId seq : seqs) births_.erase(seq.value);
        call.check = check_free(manager_, std::move(tables));
      });
}

void CallRecorder::retire(int64_t ticket) {
  LoggedCall call{.operation = LoggedCall::kRetire, .number = ticket};
  record(call, [&] { manager_.retire(ticket); }, [&] { call.check = check_counts(manager_); });
}

void CallRecorder::attach_store(const KVStore& store) {
  LoggedCall call{.operation = LoggedCall::kAttachStore};
  call.number = static_cast<int64_t>(store.tier());
  record(call, [&] { manager_.attach_store(store); }, [&] { call.check = check_counts(manager_); });
}

std::optional<std::vector<KVTransfer>> CallRecorder::fetch(SequenceId seq) {
  LoggedCall call{.operation = LoggedCall::kFetch, .seqs = births_of({&seq, 1})};
  std::optional<std::vector<KVTransfer>> loads;
  record(
      call, [&] { loads = manager_.fetch(seq); },
      [&] {
        call.check = check_loads(manager_, loads);
        if (!loads) {
          call.outcome = LoggedCall::kOutOfBlocks;
          return;
        }
        for (const KVTransfer& load : *loads)
          call.values.push_back(static_cast<int32_t>(load.tier));
        call.counts = key_heads(*loads);
      });
  return loads;
}

void CallRecorder::fetched(SequenceId seq, int32_t num_blocks) {
  LoggedCall call{.operation = LoggedCall::kFetched, .seqs = births_of({&seq, 1})};
  call.number = num_blocks;
  record(
      call, [&] { manager_.fetched(seq, num_blocks); },
      [&] { call.check = check_counts(manager_); });
}

std::optional<KVCacheManager::BlockPairs> CallRecorder::swap_out(SequenceId seq) {
  LoggedCall call{.operation = LoggedCall::kSwapOut, .seqs = births_of({&seq, 1})};
  std::optional<KVCacheManager::BlockPairs> pairs;
  record(
      call, [&] { pairs = manager_.swap_out(seq); },
      [&] {
        if (!pairs) call.outcome = LoggedCall::kOutOfBlocks;
        call.check = check_pairs(manager_, pairs);
      });
  return pairs;
}

std::optional<KVCacheManager::BlockPairs> CallRecorder::swap_in(SequenceId seq) {
  LoggedCall call{.operation = LoggedCall::kSwapIn, .seqs = births_of({&seq, 1})};
  std::optional<KVCacheManager::BlockPairs> pairs;
  record(
      call, [&] { pairs = manager_.swap_in(seq); },
      [&] {
        if (!pairs) call.outcome = LoggedCall::kOutOfBlocks;
        call.check = check_pairs(manager_, pairs);
      });
  return pairs;
}

}  // namespace quire
