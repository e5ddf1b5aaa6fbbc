// SPDX-License-Identifier: Apache-2.0
// CallLog: what was asked of a KVCacheManager and what came out, in a few bytes a call, so that a
// bug report can be run again.
//
//   CallRecorder recorder(config, log);        // log: a std::ostream
//   SequenceId seq = recorder.create(prompt);  // as KVCacheManager
//   ...
//   ReplayReport report = replay(bytes_of_log);
//
// Version 1 of the format. "quirelog", one byte 1, then varints (LEB128): num_blocks, block_size,
// prefix_caching, async_depth; then calls. A call is one byte, operation + 16 * outcome; the
// sequences, each by its number of birth 0, 1, ... (-1: not alive) as the difference to the one
// before; two lists of integers; salt; a number; all of these as zigzag varints with lengths
// before lists (salt: length + 1, 0 for none); and four bytes that check the result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "quire/kv_cache_manager.h"

namespace quire {

struct CallLogConfig {
  int32_t num_blocks;
  int32_t block_size;
  bool prefix_caching = true;
  int32_t async_depth = 0;
};

struct LoggedCall {
  enum Operation : uint8_t { kCreate, kStep, kCommit, kFork, kTruncate, kFree, kRetire };
  enum Outcome : uint8_t { kDone, kOutOfBlocks, kRefused };

  Operation operation = kCreate;
  Outcome outcome = kDone;
  std::vector<int64_t> seqs{};    // numbers of birth
  std::vector<int32_t> values{};  // create: tokens; step: num_new_tokens; commit: sampled
  std::vector<int32_t> counts{};  // commit: num_sampled
  std::optional<std::string> salt{};
  int64_t number = 0;  // truncate: num_tokens; retire: ticket
  uint32_t check = 0;  // CRC-32C over the result and the counts of blocks, see ResultCheck
};

// What a call brought about, reduced to four bytes. Every implementation of a recorder adds the
// same values in the same order:
//   free           block_table of each sequence, before the call
//   every call     int32 free, used and cached blocks, after the call; where it was done, also
//   create, fork   int64 num_cached_tokens, and block_table of the new sequence
//   step           slot_mapping, seq_lens, copies
class ResultCheck {
 public:
  void add(std::span<const int32_t> values) { add_bytes(std::as_bytes(values)); }
  void add(std::span<const int64_t> values) { add_bytes(std::as_bytes(values)); }
  uint32_t value() const;

 private:
  void add_bytes(std::span<const std::byte> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  std::vector<std::byte> bytes_;
};

// Writes each call as it comes and flushes, so that a crash loses none that returned.
class CallLogWriter {
 public:
  CallLogWriter(std::ostream& out, const CallLogConfig& config);
  void write(const LoggedCall& call);

 private:
  std::ostream& out_;
  std::string buffer_;
};

// Untrusted bytes. Throws InvalidArgument for what is no log or of another version.
class CallLogReader {
 public:
  explicit CallLogReader(std::span<const std::byte> log);
  const CallLogConfig& config() const { return config_; }

  // False: the end. A call that was cut short, as by a crash, is an end too; so is nonsense.
  bool read(LoggedCall& call);

 private:
  bool get(int64_t& value);
  bool get_list(std::vector<int32_t>& values);
  std::span<const std::byte> rest_;
  CallLogConfig config_{};
};

// A KVCacheManager that keeps a log of the calls that change it.
class CallRecorder {
 public:
  CallRecorder(const CallLogConfig& config, std::ostream& log);

  SequenceId create(std::span<const int32_t> token_ids, Salt salt = {});
  const StepBatch* step(std::span<const SequenceId> seqs, std::span<const int32_t> num_new_tokens);
  void commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled = {},
              std::span<const int32_t> num_sampled = {});
  SequenceId fork(SequenceId seq);
  void truncate(SequenceId seq, int64_t num_tokens);
  void free(std::span<const SequenceId> seqs);
  void retire(int64_t ticket);

  const KVCacheManager& manager() const { return manager_; }

 private:
  std::vector<int64_t> births_of(std::span<const SequenceId> seqs) const;
  template <class Run>
  void record(LoggedCall& call, Run run);

  KVCacheManager manager_;
  CallLogWriter writer_;
  std::unordered_map<int64_t, int64_t> births_;  // of live sequences, by serial number
  int64_t num_births_ = 0;
};

struct ReplayReport {
  int64_t num_calls = 0;                  // that were run
  std::optional<std::string> difference;  // the first; then the run has ended
};

// Runs the calls of a log on a new manager and compares every result, the ids of the blocks
// included; validates the manager at the end.
ReplayReport replay(std::span<const std::byte> log);

}  // namespace quire
