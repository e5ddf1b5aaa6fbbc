// SPDX-License-Identifier: Apache-2.0
// Scheduler: continuous batching over a KVCacheManager.
//
//   while (scheduler.has_work())
//     if (const ScheduledBatch* batch = scheduler.schedule()) {
//       ...                                   // run the model on batch->token_ids
//       scheduler.commit(sampled);            // a token for each entry of batch->sampling
//     }
//
// Running requests come before waiting ones: higher priorities first, then in order of admission.
// Which waiting request comes next is told in request_queue.h: without priorities and tenants, the
// first that came. It is admitted when all of its known tokens fit beside what the running ones
// still have to compute; long prompts are then computed in chunks. When a running request needs a
// block and none is left, the last of the running ones gives its blocks back and waits before its
// equals; later its tokens, the generated ones too, are computed again. Where the manager has host
// blocks and config.preemption says that moving is cheaper (preemption.h), its blocks go to host
// memory instead, and come back all at once when it is its turn: the batches tell what to copy.
// What the cache has of it by then is taken from there. The first is never preempted for another,
// so all requests finish. The same calls lead to the same decisions.
//
// Steps in which every running request decodes on cost least: what they change is counted up
// later, and the manager is called as its DecodeLoop wants it.
//
// What throws std::bad_alloc can be called again. add() and finish() have changed nothing then;
// schedule() may have preempted and admitted requests, and the next batch tells of their copies;
// commit() wants the same tokens once more, and its KV may be committed already.
//
// Any number of threads may call every function; they share the manager's lock. What schedule()
// and commit() hand out is for the thread that calls these two; the others add, finish and ask.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "quire/kv_cache_manager.h"
#include "quire/preemption.h"
#include "quire/request_queue.h"
#include "quire/step_batch.h"

namespace quire {

struct SchedulerConfig {
  int32_t max_tokens_per_step = 2048;
  int32_t max_seqs = 256;   // running at once
  double watermark = 0.01;  // share of the blocks that admission leaves free
  // Of this many waiting requests of equal rank the one with the longest cached prefix comes first.
  int32_t prefix_window = 1;
  int32_t max_overtakes = 256;      // then a request is due, whatever its rank
  PreemptionCosts preemption = {};  // as they are: nothing is swapped
};

struct RequestOptions {
  int32_t priority = 0;  // higher ones first
  std::string_view tenant = {};
};

// One step. Valid until the next schedule().
struct ScheduledBatch {
  StepArray<int32_t> request_ids;     // [n]
  StepArray<int32_t> num_new_tokens;  // [n]
  StepArray<int32_t> token_ids;       // [total new tokens]
  StepArray<int32_t> sampling;        // [m]: rows that compute their last known token
  int32_t num_preempted = 0;          // since the batch before
  // [n, 2]: blocks to copy before the step, whose own copies come behind these. First swap_out,
  // (block, host block), then swap_in, (host block, block).
  StepArray<int32_t> swap_out, swap_in;
  const StepBatch* step = nullptr;
};

class Scheduler {
 public:
  // The manager must outlive the scheduler; it may hold other sequences too.
  explicit Scheduler(KVCacheManager& manager, const SchedulerConfig& config = {});
  Scheduler(const Scheduler&) = delete;
  ~Scheduler();

  // Returns the request's id: 0, 1, 2, ...
  int32_t add(std::span<const int32_t> token_ids, int32_t max_new_tokens, Salt salt = {},
              const RequestOptions& options = {});

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

  // What the latest schedule() decided, and why no further request was admitted: a line each.
  std::string explain() const;

  const ScheduledBatch& batch() const { return batch_; }  // the latest
  const KVCacheManager& manager() const { return manager_; }

  // Walks everything, the manager too; throws InvariantError.
  void validate() const;

 private:
  enum class State : uint8_t { kEnded, kWaiting, kRunning };
  struct Request {
    State state = State::kEnded;
    bool is_fresh = false;  // no step since its admission: its last block may be shared
    int32_t id = -1;
    int32_t num_left = 0;    // tokens to generate
    int32_t last_token = 0;  // of those known
    SequenceId seq;
    int64_t num_tokens = 0;  // known
    int64_t num_computed = 0;
    int64_t num_swapped = 0;  // computed, and in host memory
  };
  struct Row {
    int32_t slot;  // of the request; -1: it was finished after schedule()
    int32_t num_new;
    int32_t num_missing;  // blocks
    bool samples;
  };
  struct Decision {
    enum Kind : uint8_t { kPreempted, kSwappedOut, kAdmitted, kSwappedIn, kChunked } kind;
    int32_t id;
    int64_t num_tokens;  // to compute again; moved; computed now; computed now; left after a chunk
    int64_t num_cached;  // of who is admitted: computed before
  };
  enum class Blocked : uint8_t {
    kNobodyWaits,
    kMadeRoom,
    kMaxSeqs,
    kBudget,
    kPrefix,
    kBlocks,
    kUnknown
  };

  int32_t missing_blocks(const Request& request, int64_t end) const;
  Row plan_row(int32_t slot, int32_t budget) const;
  void plan_running();
  bool make_room();
  void preempt_last();
  bool prefers_swap(const Request& request) const;
  bool swap_out(Request& request);
  void give_up_swapped(Request& request);
  bool come_back(Request& request, int64_t num_cached);
  void write_swaps();
  void admit();
  Blocked admit_next();
  int32_t choose_next();
  bool waits_for_prefix(const Request& head);
  void start_running(int32_t slot, int64_t num_cached);
  void forget_head();
  void write_batch();

  Blocked known_block() const;
  const ScheduledBatch* go_on();
  void begin_going_on();
  void catch_up();

  void commit_going_on(std::span<const int32_t> sampled);
  void commit_rows(std::span<const int32_t> sampled);
  void leave_out_finished(std::span<const int32_t> sampled);
  void end_finished();
  void end(int32_t slot);
  void remove_ended();

  KVCacheManager& manager_;
  SchedulerConfig config_;
  BlockSize block_size_;
  bool caches_states_;  // of the manager
  int32_t num_watermark_blocks_;
  bool may_swap_;
  std::vector<Request> requests_;  // by slot
  std::vector<int32_t> unused_slots_;
  std::unordered_map<int32_t, int32_t> slots_;  // by request id
  int32_t next_id_ = 0;
  std::vector<int32_t> running_;  // slots by priority, then in order of admission
  RequestQueue queue_;
  int64_t num_preemptions_ = 0;

  // The step in the making.
  bool is_scheduled_ = false;  // schedule() was called, commit() not yet
  bool is_committed_ = false;  // but for ending those that have finished
  std::vector<Row> rows_;
  int32_t budget_ = 0;
  int32_t num_preempted_ = 0;  // since the batch before
  int64_t num_missing_ = 0;    // blocks that the rows need now
  int64_t num_promised_ = 0;   // blocks that running requests need for all their known tokens
  struct SwapOut {
    int32_t id;
    KVCacheManager::BlockPairs pairs;
  };
  std::vector<SwapOut> swap_outs_;  // since the batch before
  KVCacheManager::BlockPairs swap_ins_;
  std::vector<KVTransfer> offloads_;  // what these evicted
  ScheduledBatch batch_;
  std::vector<Decision> decisions_;
  Blocked blocked_ = Blocked::kNobodyWaits;  // why admission ended

  // While all rows decode on: requests' counts lag behind, until catch_up().
  int32_t num_lagging_ = 0;   // commits
  int32_t num_to_go_on_ = 0;  // commits until a request ends; 0: the rows don't decode on
  std::vector<int32_t> next_tokens_;

  // Why the next request waits, so that its prompt is not searched for again each step.
  int32_t head_ = -1;          // its slot; -1: not known
  int32_t leader_ = -1;        // a running request that computes a prefix of the head,
  int64_t leader_tokens_ = 0;  // this long
  int64_t head_needs_ = 0;     // blocks, when last looked at; 0: not looked at

  // Scratch of one call.
  std::vector<SequenceId> seqs_;
  std::vector<int32_t> counts_;
  std::vector<int32_t> finished_;
};

}  // namespace quire
