// SPDX-License-Identifier: Apache-2.0
// Scheduler: continuous batching over a KVCacheManager, first come, first served.
//
//   while (scheduler.has_work())
//     if (const ScheduledBatch* batch = scheduler.schedule()) {
//       ...                                   // run the model on batch->token_ids
//       scheduler.commit(sampled);            // a token for each entry of batch->sampling
//     }
//
// Running requests come before waiting ones and keep their order of admission. A request is
// admitted when all of its known tokens fit beside what the running ones still have to compute;
// long prompts are then computed in chunks. When a running request needs a block and none is
// left, the latest admitted one gives its blocks back and waits at the front of the queue; later
// its tokens, the generated ones too, are computed again. The earliest is never preempted for
// another, so all requests finish.
//
// Any number of threads may call every function; they share the manager's lock. What schedule()
// and commit() hand out is for the thread that calls these two; the others add, finish and ask.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <unordered_map>
#include <vector>

#include "quire/kv_cache_manager.h"
#include "quire/step_batch.h"

namespace quire {

struct SchedulerConfig {
  int32_t max_tokens_per_step = 2048;
  int32_t max_seqs = 256;   // running at once
  double watermark = 0.01;  // share of the blocks that admission leaves free
};

// One step. Valid until the next schedule().
struct ScheduledBatch {
  StepArray<int32_t> request_ids;     // [n]
  StepArray<int32_t> num_new_tokens;  // [n]
  StepArray<int32_t> token_ids;       // [total new tokens]
  StepArray<int32_t> sampling;        // [m]: rows that compute their last known token
  int32_t num_preempted = 0;          // since the batch before
  const StepBatch* step = nullptr;
};

class Scheduler {
 public:
  // The manager must outlive the scheduler; it may hold other sequences too.
  explicit Scheduler(KVCacheManager& manager, const SchedulerConfig& config = {});
  Scheduler(const Scheduler&) = delete;
  ~Scheduler();

  // Returns the request's id: 0, 1, 2, ...
  int32_t add(std::span<const int32_t> token_ids, int32_t max_new_tokens, Salt salt = {});

  // Null: nothing to do or, with an asynchronous manager, all blocks wait for retire().
  const ScheduledBatch* schedule();

  // `sampled`: one token for each entry of the batch's `sampling`. Returns the requests that have
  // reached max_new_tokens (valid until the next call); their blocks are given back.
  std::span<const int32_t> commit(std::span<const int32_t> sampled);

  // Ends a request early, in any state. No effect on one that has ended.
  void finish(int32_t request_id);

  int32_t num_running() const;
  int32_t num_waiting() const;
  int64_t num_preemptions() const;
  bool has_work() const;
  const ScheduledBatch& batch() const { return batch_; }  // the latest
  const KVCacheManager& manager() const { return manager_; }

  // Walks everything, the manager too; throws InvariantError.
  void validate() const;

 private:
  enum class State : uint8_t { kEnded, kWaiting, kRunning };
  struct Request {
    State state = State::kEnded;
    int32_t id = -1;
    int32_t num_left = 0;  // tokens to generate
    SequenceId seq;
  };
  struct Row {
    int32_t slot;  // of the request; -1: it was finished after schedule()
    int32_t num_new;
    int32_t num_missing;  // blocks
    bool samples;
  };

  Row plan_row(int32_t slot, int32_t budget) const;
  void plan_running();
  bool make_room();
  void preempt_latest();
  void admit();
  bool waits_for_prefix();
  void write_batch();
  void end(int32_t slot);
  void remove_ended();

  KVCacheManager& manager_;
  SchedulerConfig config_;
  int32_t num_watermark_blocks_;
  std::vector<Request> requests_;  // by slot
  std::vector<int32_t> unused_slots_;
  std::unordered_map<int32_t, int32_t> slots_;  // by request id
  int32_t next_id_ = 0;
  std::vector<int32_t> running_;  // slots in order of admission
  std::deque<int32_t> waiting_;
  int64_t num_preemptions_ = 0;

  // The step in the making.
  bool is_scheduled_ = false;  // schedule() was called, commit() not yet
  std::vector<Row> rows_;
  int32_t budget_ = 0;
  int32_t num_preempted_ = 0;  // since the batch before
  int64_t num_missing_ = 0;    // blocks that the rows need now
  int64_t num_promised_ = 0;   // blocks that running requests need for all their known tokens
  ScheduledBatch batch_;

  // Why the head of the queue waits, so that its prompt is not searched for again each step.
  int32_t leader_ = -1;        // a running request that computes a prefix of the head,
  int64_t leader_tokens_ = 0;  // this long
  int64_t head_needs_ = 0;     // blocks, when last looked at; 0: not looked at

  // Scratch of one call.
  std::vector<SequenceId> seqs_;
  std::vector<int32_t> counts_;
  std::vector<int32_t> sampled_;
  std::vector<int32_t> finished_;
};

}  // namespace quire
