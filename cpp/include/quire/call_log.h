// SPDX-License-Identifier: Apache-2.0
// CallLog: what was asked of a KVCacheManager and what came out, in a few bytes a call, so that a
// bug report can be run again.
//
//   CallRecorder recorder(config, log);        // log: a std::ostream
//   SequenceId seq = recorder.create(prompt);  // as KVCacheManager
//   ...
//   ReplayReport report = replay(bytes_of_log);
//
// Version 3 of the format; others are refused. "quirelog", one byte 3, then varints (LEB128,
// zigzag): num_blocks, block_size, prefix_caching, async_depth, eviction, event_capacity,
// num_host_blocks, how many layer groups, and kind and size of each; then calls. A call is one
// byte, operation + 32 * outcome; the sequences, each by its number of birth 0, 1, ... (-1: not
// alive) as the difference to the one before; two lists of integers; salt; a number; all of these
// as such varints with lengths before lists (salt: length + 1, 0 for none); and four bytes that
// check the result.
//
// What stores hold decides what fetch() loads, so a log names tier and key of each load; a replay
// needs no store. Where a time to live is given, a log holds the time of each later call.
// take_offloads() and take_events() decide nothing and are not in a log.
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
  KVCacheOptions options{};
};

struct LoggedCall {
  enum Operation : uint8_t {
    kCreate,
    kStep,
    kCommit,
    kFork,
    kTruncate,
    kFree,
    kRetire,
    kAttachStore,
    kFetch,
    kFetched,
    kSwapOut,
    kSwapIn,
    kPin,
    kUnpin,
    kOpen,
    kAttach,
    kDetach,
    kClearCache,
    kSetTime,
  };
  static constexpr Operation kLastOperation = kSetTime;
  enum Outcome : uint8_t { kDone, kOutOfBlocks, kRefused };

  Operation operation = kCreate;
  Outcome outcome = kDone;
  std::vector<int64_t> seqs{};  // numbers of birth
  // create, open: tokens; step: num_new_tokens; commit: sampled; fetch: tiers of the loads; pin,
  // unpin: tokens, where no sequence is named
  std::vector<int32_t> values{};
  // fork: a 0 for each child, so that damaged logs ask for no more than they hold;
  // commit: num_sampled; fetch: the first 8 bytes of each load's key, as 2; create, open with
  // another Retention than the default: priority, and the bits of ttl as 2, the lower first
  std::vector<int32_t> counts{};
  std::optional<std::string> salt{};
  // step: lookahead; truncate: num_tokens; retire: ticket; attach_store: tier;
  // fetched: num_blocks; set_time: ns
  int64_t number = 0;
  uint32_t check = 0;  // CRC-32C over the result and the counts of blocks, see ResultCheck
};

// What a call brought about, reduced to four bytes. Every implementation of a recorder adds the
// same values in the same order:
//   free, detach       block_table of each sequence in each layer group, before the call
//   every call         int32 free, used and cached blocks, after the call; where it was done, also
//   create, fork, open, attach
//                      int64 num_cached_tokens, and block_table of each new sequence in each group
//   step               slot_mapping, seq_lens, copies; of each group but the first: copies, and
//                      block_table of each sequence
//   fetch              blocks of all loads, then their keys, as 8 int32 each
//   swap_out, swap_in  pairs
//   pin, unpin, clear_cache  the int64 that is returned
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
  void end();  // nothing comes any more: the stream is bad

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

// A KVCacheManager that keeps a log of the calls that change it. A call that cannot be written for
// want of memory is done all the same; the log ends before it then, and its stream is bad().
class CallRecorder {
 public:
  CallRecorder(const CallLogConfig& config, std::ostream& log);

  SequenceId create(std::span<const int32_t> token_ids, Salt salt = {}, Retention retention = {});
  const StepBatch* step(std::span<const SequenceId> seqs, std::span<const int32_t> num_new_tokens,
                        int32_t lookahead = 0);
  void commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled = {},
              std::span<const int32_t> num_sampled = {});
  SequenceId fork(SequenceId seq);
  void fork(SequenceId seq, std::span<SequenceId> children);
  void truncate(SequenceId seq, int64_t num_tokens);
  void free(std::span<const SequenceId> seqs);
  void retire(int64_t ticket);
  int64_t pin(std::span<const int32_t> token_ids, Salt salt = {});
  int64_t pin(SequenceId seq);
  int64_t unpin(std::span<const int32_t> token_ids, Salt salt = {});
  int64_t unpin(SequenceId seq);
  int32_t clear_cache();
  SequenceId open(std::span<const int32_t> token_ids, Salt salt = {}, Retention retention = {});
  void attach(SequenceId seq);
  void detach(SequenceId seq);
  void attach_store(const KVStore& store);
  std::vector<KVTransfer> take_offloads() { return manager_.take_offloads(); }
  std::optional<std::vector<KVTransfer>> fetch(SequenceId seq);
  void fetched(SequenceId seq, int32_t num_blocks);
  std::optional<KVCacheManager::BlockPairs> swap_out(SequenceId seq);
  std::optional<KVCacheManager::BlockPairs> swap_in(SequenceId seq);

  const KVCacheManager& manager() const { return manager_; }

 private:
  std::vector<int64_t> births_of(std::span<const SequenceId> seqs) const;
  template <class Run, class Look>
  void record(LoggedCall& call, Run run, Look look);
  template <class Look>
  void write(LoggedCall& call, Look look);
  template <class Run>
  SequenceId record_birth(LoggedCall call, std::span<const int32_t> token_ids, Salt salt,
                          const Retention& retention, Run run);
  template <class Run>
  int64_t record_pins(LoggedCall call, Run run);

  KVCacheManager manager_;
  CallLogWriter writer_;
  std::unordered_map<int64_t, int64_t> births_;  // of live sequences, by serial number
  int64_t num_births_ = 0;
  bool needs_time_ = false;  // some sequence has a time to live
};

struct ReplayReport {
  int64_t num_calls = 0;                  // that were run
  std::optional<std::string> difference;  // the first; then the run has ended
};

// Runs the calls of a log on a new manager and compares every result, the ids of the blocks
// included; validates the manager at the end.
ReplayReport replay(std::span<const std::byte> log);

}  // namespace quire
