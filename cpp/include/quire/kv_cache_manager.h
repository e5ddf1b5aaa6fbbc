// SPDX-License-Identifier: Apache-2.0
// KVCacheManager: the sequences of an engine and the blocks that hold their KV.
//
//   SequenceId seq = manager.create(prompt);               // shares the cached prefix
//   const StepBatch* batch = manager.step(seqs, counts);   // slots for the next tokens, or null
//   ...                                                    // copy blocks, run the model
//   manager.commit(seqs, sampled);                         // the KV is written; new tokens known
//
// A sequence has three marks: num_computed_tokens <= planned <= num_tokens. step() plans known
// tokens, commit() makes planned ones computed and appends the sampled ones. With prefix caching
// every full block of computed tokens is in the prefix cache, so that a sequence's leading blocks
// are a path of its tree; a block that another sequence computed first replaces the own one. What
// a sequence leaves behind in a last, partial block is cached when it ends.
//
// A sequence may begin in the middle of a cached block, or go on in the middle of a block that
// others hold (after fork() or truncate()). Its first write there goes to a copy:
// StepBatch::copies.
//
// What is evicted can go to stores, and what stores hold be fetched; a sequence can wait in host
// memory. The manager moves no bytes: it says which, in take_offloads(), fetch(), swap_out(),
// swap_in(). The copies come in the order of the calls, each before any KV of a later step is
// written.
//
// Steps of the same sequences with one new token each are the common case and cost least: only
// sequences that begin or fill a block are looked at (DecodeLoop).
//
// Layers that keep different parts of the KV (LayerGroup) have tables and blocks of their own, a
// StepBatch each, and no loop. A hit then ends with a whole block, where every group has what it
// needs. What a group does not read any more it gives back with commit(): those entries are -1.
//
// Every function either does all it says or throws InvalidArgument, or std::bad_alloc, and changes
// nothing.
//
// Any number of threads may call every function at any time. match() and stats() give way to the
// other calls after every few blocks: whoever plans the steps waits for these, and longer only
// where the system takes the reader off its core just then. lock() makes several calls one. What is
// handed out by reference (StepBatch, valid until the next step; pending_tokens(), batch(),
// allocator()) is not protected once the call is over: read it in the thread that steps, or under
// lock().
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "quire/block_allocator.h"
#include "quire/block_keys.h"
#include "quire/block_table.h"
#include "quire/block_timers.h"
#include "quire/decode_loop.h"
#include "quire/event_log.h"
#include "quire/kv_cache_types.h"
#include "quire/kv_store.h"
#include "quire/prefix_cache.h"
#include "quire/priority_mutex.h"
#include "quire/step_batch.h"

namespace quire {

namespace snapshot {
class Reader;
}

class KVCacheManager {
 public:
  // async_depth: how many steps may run while the host plans on; 0: the host waits for each.
  KVCacheManager(int32_t num_blocks, int32_t block_size, bool prefix_caching = true,
                 int32_t async_depth = 0, const KVCacheOptions& options = {});
  KVCacheManager(const KVCacheManager&) = delete;

  // Everything but attached stores and events, as JSON. The manager that restore() makes of it
  // goes on with the same ids of sequences and blocks; its first events name what is cached.
  // Refused while a fetch() is under way; restore() throws InvalidArgument for what is no snapshot.
  std::string snapshot() const;
  static KVCacheManager restore(std::string_view snapshot);
  ~KVCacheManager();

  // While the caller keeps what this returns, other threads' calls wait. Keep it shortly.
  std::unique_lock<PriorityMutex> lock() const { return std::unique_lock(mutex_); }

  // A sequence of these tokens. Takes references on the cached prefix, and leaves at least the
  // last token to compute.
  SequenceId create(std::span<const int32_t> token_ids, Salt salt = {}, Retention retention = {});

  // Gives slots to the next num_new_tokens[i] known tokens of each sequence, and blocks (no slots)
  // to `lookahead` tokens behind them. Null when out of blocks: then nothing has changed. A second
  // step without commit() plans the same tokens again.
  const StepBatch* step(std::span<const SequenceId> seqs, std::span<const int32_t> num_new_tokens,
                        int32_t lookahead = 0);

  // The KV of the planned tokens is written. `sampled` holds new token ids, num_sampled[i] of each
  // sequence; without num_sampled one of each, or none at all.
  void commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled = {},
              std::span<const int32_t> num_sampled = {});

  // A sequence of the same tokens that shares every block with computed tokens. The first write
  // to a shared partial block copies it, whoever writes. With a state group not between step() and
  // commit(): the state may be that of the step already.
  SequenceId fork(SequenceId seq);
  void fork(SequenceId seq, std::span<SequenceId> children);  // fills `children`

  // Keeps the first num_tokens tokens, 1 or more. Where a group has given up what it needs to go on
  // from there (a window that has moved on, a state that has seen more), the sequence keeps the
  // tokens and computes those again that the prefix cache does not give back: num_computed_tokens.
  void truncate(SequenceId seq, int64_t num_tokens);
  void free(std::span<const SequenceId> seqs);

  // The step of this ticket, and so every earlier one, has run. Blocks that were freed or copied
  // from meanwhile rejoin the pool.
  void retire(int64_t ticket);

  // What create() would find; no side effect.
  PrefixMatch match(std::span<const int32_t> token_ids, Salt salt = {}) const;

  // The cached whole blocks of a prefix, or of a sequence's computed tokens, are not evicted until
  // unpin(), which takes the longest pin() within its tokens back. Both return how many those are.
  int64_t pin(std::span<const int32_t> token_ids, Salt salt = {});
  int64_t pin(SequenceId seq);
  int64_t unpin(std::span<const int32_t> token_ids, Salt salt = {});
  int64_t unpin(SequenceId seq);

  // Gives up all cached blocks that nobody uses, of every salt, and offers them to no store: their
  // KV is wrong now, as that of other weights is, or must not stay. Returns how many those were.
  // What is in use stays findable; stores keep what they have.
  int32_t clear_cache();

  // Where to look for prefixes that the pool does not hold, the nearest store first, and where to
  // evicted blocks may go. One store a tier; it must outlive the manager.
  void attach_store(const KVStore& store);

  // Blocks that the latest step(), fetch() or swap_in() evicted, whole ones that some store lacks:
  // their contents are lost unless they are put there before any KV is written. Each comes once.
  // After Scheduler::schedule() all that it evicted.
  std::vector<KVTransfer> take_offloads();
  size_t num_offloads() const;  // that take_offloads() would return

  // Takes blocks for what stores hold of the sequence's tokens behind the computed ones, all but
  // the last, as far as every group has what it needs. Null when out of blocks: then nothing has
  // changed. The transfers, in order, are to be got from the store of their tier; fetched() says
  // how many of the first came, 0 or more: what these make complete is computed now, the other
  // blocks are given back. Until then the sequence can do nothing.
  std::optional<std::vector<KVTransfer>> fetch(SequenceId seq);
  void fetched(SequenceId seq, int32_t num_blocks);

  // Preemption that loses nothing. What the sequence needs to go on, in blocks of every group,
  // moves to host memory: [n, 2] pairs of block and host block to copy. It holds none of the pool
  // until swap_in(), whose pairs go the other way; blocks that the prefix cache still has need no
  // copy then. Shared ones are copied too: whoever else holds them may give them up before. Null
  // when there is no room: then nothing has changed. detach() and free() give host blocks up. With
  // a state group not between step() and commit(), as fork().
  using BlockPairs = std::vector<std::array<int32_t, 2>>;
  std::optional<BlockPairs> swap_out(SequenceId seq);
  std::optional<BlockPairs> swap_in(SequenceId seq);
  bool is_swapped_out(SequenceId seq) const;

  // For schedulers. A sequence may be known without holding blocks: open() makes one so, attach()
  // takes the cached prefix (create() is both), detach() gives all blocks back and keeps the
  // tokens.
  SequenceId open(std::span<const int32_t> token_ids, Salt salt = {}, Retention retention = {});
  void attach(SequenceId seq);
  void detach(SequenceId seq);
  PrefixMatch match(SequenceId seq) const;
  // How many leading tokens of the two could lie in the same blocks, or 0 if not `more_than` so
  // many.
  int64_t shareable_tokens(SequenceId a, SequenceId b, int64_t more_than = 0) const;
  // New blocks that a sequence needs to compute its first num_tokens tokens, a copy of its last
  // block included where it shares that; at most max_step tokens a step.
  int32_t num_missing_blocks(SequenceId seq, int64_t num_tokens,
                             int64_t max_step = std::numeric_limits<int64_t>::max()) const;
  // Blocks of all groups that a sequence alone needs for so many tokens, computed likewise.
  int64_t num_blocks_for(int64_t num_tokens, int64_t max_step) const;

  // Times to live count from and to this time, in ns, and not the system's any more: for tests,
  // and for logs that have to run again as they ran.
  void set_time(int64_t ns);

  // What happened to cached blocks since the last call, the oldest first; a gap in their numbers
  // stands for events that were lost. Whoever takes all of them knows which blocks are cached.
  std::vector<CacheEvent> take_events();
  std::vector<int32_t> cached_blocks() const;  // all whose contents can be found

  std::vector<int32_t> tokens(SequenceId seq) const;
  std::span<const int32_t> pending_tokens(SequenceId seq) const;  // known, and not computed
  // Of a group; -1: given back. Of a state group its one block, once there is a state.
  std::vector<int32_t> block_table(SequenceId seq, int32_t group = 0) const;
  int64_t num_tokens(SequenceId seq) const;
  int64_t num_computed_tokens(SequenceId seq) const;
  int64_t num_cached_tokens(SequenceId seq) const;  // from the cache

  bool may_step() const;  // false: async_depth steps run, one must be retired first
  const BlockAllocator& allocator() const { return allocator_; }
  const StepBatch& batch(int32_t group = 0) const {  // of the latest step
    return group == 0 ? batch_ : group_batches_[group - 1];
  }
  int32_t num_groups() const { return companions_ ? companions_->num_groups() : 1; }
  LayerGroup group(int32_t group) const {
    return companions_ ? companions_->group(group) : LayerGroup{};
  }
  bool prefix_caching() const { return cache_.has_value(); }
  bool caches_states() const;  // of state groups, where a step ends with a block
  int64_t num_deferred_refs() const;
  int32_t num_sequences() const;
  std::vector<SequenceId> sequences() const;
  int64_t num_bytes() const;  // of all arrays whose size depends on num_blocks
  KVCacheStats stats() const;
  std::vector<LayerGroupStats> group_stats() const;  // one a group

  // Walks everything; throws InvariantError.
  void validate() const;

 private:
  // Full blocks of computed tokens that forks have in common. It holds one reference on each.
  struct Trunk {
    int32_t num_holders = 0;
    std::vector<int32_t> blocks;
    std::vector<int32_t> tokens;  // of those blocks
  };
  // What a sequence has of a group other than the first: a table of as many entries as the first
  // group's, or the one block of a state.
  struct GroupTable {
    BlockTable table;
    int32_t num_behind = 0;  // leading entries that were given back
  };
  enum class Away : uint8_t { kNo, kFetching, kSwapped };
  // What a decode step reads comes first, in two cache lines.
  struct alignas(64) Sequence {
    SequenceId id;     // no sequence: an unused entry
    int32_t root = 0;  // of the prefix cache
    int32_t row = -1;  // of the running DecodeLoop
    Trunk* trunk = nullptr;
    std::vector<int32_t> tokens;  // behind the trunk's
    BlockTable table{1};
    bool was_attached = false;
    Away away = Away::kNo;
    Retention retention;
    int64_t num_computed = 0;
    int64_t num_planned = 0;  // beyond num_computed
    int64_t num_cached = 0;
    uint64_t visit = 0;              // the latest call that named this sequence
    std::vector<GroupTable> groups;  // but the first
    int64_t num_trunk_tokens() const {
      return trunk ? static_cast<int64_t>(trunk->tokens.size()) : 0;
    }
    int64_t num_tokens() const { return num_trunk_tokens() + static_cast<int64_t>(tokens.size()); }
    // From a position behind the trunk to the end.
    const int32_t* tokens_from(int64_t position) const {
      return tokens.data() + (position - num_trunk_tokens());
    }
  };
  struct Copy {  // copy-on-write of a sequence's last, partial block
    Sequence* seq;
    int32_t group;
    int32_t index;  // into its table
    int32_t source;
    bool dropped;           // the reference on the source is given up already
    bool in_place = false;  // no copy: the source leaves the prefix cache instead
  };
  struct Deferred {
    int64_t ticket;
    int32_t block;
  };
  struct Swapped {
    int64_t num_computed;
    std::vector<int32_t> slots;  // host blocks, of one group after the other
  };
  // Blocks that a fetch() holds for its sequence, which is as it was until fetched().
  struct Fetch {
    int32_t first, end;  // whole blocks that the sequence has, and has when everything comes
    std::vector<KVTransfer> loads;
    std::vector<std::array<int32_t, 2>> places;  // group and entry of each load
    // [num_groups][end - first], from the pool or to be loaded; -1: not needed
    std::vector<std::vector<int32_t>> blocks;
  };
  struct YieldedMatch {  // a match() that has given way
    int32_t block;
    bool is_lost;  // the block was evicted meanwhile
    YieldedMatch* next;
  };
  struct Snapshot;  // kv_snapshot.cpp
  explicit KVCacheManager(const Snapshot& snapshot);
  void save_sequences(Snapshot& snapshot) const;
  void load_sequences(const Snapshot& snapshot);
  std::vector<std::unique_ptr<Trunk>> load_trunks(const Snapshot& snapshot) const;
  int64_t load_sequence(Sequence& seq, snapshot::Reader& reader,
                        const std::vector<std::unique_ptr<Trunk>>& trunks);
  void load_unused(const Snapshot& snapshot);
  void load_swapped(const Snapshot& snapshot);
  static void reserve_serials(int64_t last);
  static int64_t take_serials(int64_t count);
  void save_companions(Snapshot& snapshot) const;
  void load_companions(const Snapshot& snapshot);
  void load_batches(const Snapshot& snapshot);
  void save_retention(Snapshot& snapshot) const;
  void load_retention(const Snapshot& snapshot);

  bool is_live(SequenceId id) const;
  const Sequence& get(SequenceId id) const;
  Sequence& get(SequenceId id);
  Sequence& sequence_of(SequenceId id) { return sequences_[id.index()]; }  // a live one
  void visit(const char* function, std::span<const SequenceId> seqs);
  void reserve_sequences(size_t count);
  Sequence& unused_sequence(size_t ahead);
  Sequence& add_sequence(int64_t serial);
  void remove_sequence(Sequence& seq);
  void close(SequenceId id);
  int64_t num_computed(const Sequence& seq) const;

  int64_t find_path(int32_t root, std::span<const int32_t> tokens) const;
  std::optional<PrefixMatch> match(int32_t root, std::span<const int32_t> tokens) const;
  PrefixMatch match_at_once(int32_t root, std::span<const int32_t> tokens) const;
  void reserve_path(Sequence& seq, int64_t num_tokens);
  void take_path(Sequence& seq, int64_t num_cached);
  bool give_way_at(int32_t block) const;
  bool shares_last_block(const Sequence& seq, int32_t group = 0) const;

  struct StepNeed {
    StepBatch::Size size;
    int64_t num_missing = 0;  // blocks, copies apart
  };
  StepNeed check_step(std::span<const int32_t> num_new_tokens, int32_t lookahead);
  bool take_blocks(std::span<const int32_t> num_new_tokens, int32_t lookahead, StepNeed need);
  void plan_copies(std::span<const int32_t> num_new_tokens, int32_t lookahead);
  void plan_copy(Sequence& seq, int32_t group);
  void undo_copies();
  int64_t take_over(int64_t num_short);
  void reserve_blocks(int64_t num_blocks);
  bool allocate(int64_t num_blocks);
  int32_t evict(int32_t victim);
  void forget(const Copy& copy);
  std::span<const int32_t> apply_copies();

  bool continues_loop(std::span<const SequenceId> seqs) const;
  void begin_loop(std::span<const SequenceId> seqs);
  bool fits_loop() const;
  void prefetch_rows(int32_t first_rank, int32_t last_rank, int32_t step) const;
  const StepBatch* step_loop();
  void commit_loop(std::span<const int32_t> sampled);
  void fill_first_blocks(int32_t first_rank, int32_t last_rank);
  void fill_blocks(int32_t first_rank, int32_t last_rank);
  bool is_replaced(int32_t rank) const;
  void settle();
  void settle() const {  // nobody can tell
    if (loop_.is_running()) const_cast<KVCacheManager*>(this)->settle();
  }

  void prepare_advance(Sequence& seq, int32_t num_new_tokens);
  int64_t most_released(const Sequence& seq) const;
  void advance(Sequence& seq);
  int32_t publish(int32_t parent, const int32_t* tokens, int32_t block);
  int32_t publish(Sequence& seq, int32_t index);
  void publish(Sequence& seq, int32_t first, int32_t last);
  void keep_partial_block(Sequence& seq);
  void make_trunk(Sequence& seq);
  void drop_trunk(Sequence& seq);
  void unshare(Sequence& seq);
  void trim(Sequence& seq, int32_t num_blocks);
  void give_back(Sequence& seq);
  void retain(const Retention& retention, int32_t block);
  void reserve_releases(int64_t count);
  static int64_t num_held(const Sequence& seq);
  void release(int32_t block);
  void release_now(int32_t block);
  void expire();
  int64_t now_ns() const;
  int64_t pin(int32_t root, std::span<const int32_t> tokens);
  int64_t unpin(int32_t root, std::span<const int32_t> tokens);

  BlockTable& table_of(Sequence& seq, int32_t group) {
    return group == 0 ? seq.table : seq.groups[group - 1].table;
  }
  int64_t missing_in_groups(const Sequence& seq, int64_t end, int64_t max_step) const;
  StepBatch::Size size_of(int32_t group, const StepBatch::Size& size) const;
  std::span<const int32_t> extend_groups(Sequence& seq, int64_t end, int64_t reach,
                                         std::span<const int32_t> fresh);
  void advance_groups(Sequence& seq, int64_t end);
  void publish_companion(Sequence& seq, int32_t group, int32_t entry, int32_t index);
  void give_back_behind(Sequence& seq, int32_t group, int64_t num_computed);
  void attach_groups(Sequence& seq);
  void share_groups(const Sequence& parent, Sequence& child);
  bool groups_reach(const Sequence& seq, int64_t num_tokens) const;
  void trim_groups(Sequence& seq, int32_t num_blocks);
  void add_companions_to_path();
  void validate_groups(const Sequence& seq) const;
  void validate_companions() const;

  struct Held {  // a block that a sequence holds and has not filled, or a deferred reference
    int32_t block;
    int32_t num_tokens;  // computed
    bool by_sequence;
  };
  void collect_held(PatientLock& lock, std::vector<Held>* held) const;
  void count_used(PatientLock& lock, KVCacheStats* stats) const;

  // Called where a block enters the prefix cache, is hit, or is about to leave. Free of cost while
  // nothing follows along.
  void on_stored(int32_t block, std::span<const int32_t> tokens) {
    if (is_watched_) watch_stored(block, tokens);
  }
  void on_hit(int32_t block) {
    if (is_watched_) watch_hit(block);
  }
  void on_left(int32_t block) {
    if (yielded_ || timers_) watch_left(block);
  }
  void watch_left(int32_t block);
  void watch_stored(int32_t block, std::span<const int32_t> tokens);
  void watch_hit(int32_t block);
  void watch_evicted(int32_t block);
  void watch_companion_evicted(int32_t block);
  void push_event(CacheEventKind kind, int32_t block, CacheTier tier = CacheTier::kDevice);
  uint64_t root_id(int32_t root) const;

  friend class Scheduler;  // which calls match() first; whose step comes after its swap_in()s
  void attach_matched(SequenceId seq, int64_t num_matched);
  void offer_also(std::vector<KVTransfer> offloads);
  void drop_offloads();
  bool is_in_all_stores(const ChainKey& key) const;
  const KVStore* store_with(const ChainKey& key) const;
  Fetch find_in_stores(const Sequence& seq);
  int32_t reach_of(const Sequence& seq, const Fetch& fetch) const;
  void reserve_fetched(Sequence& seq, const Fetch& fetch, int32_t end);
  void take_fetched(Sequence& seq, Fetch& fetch, int32_t end, size_t num_came);
  void check_here(const char* function, const Sequence& seq) const;
  void check_no_step(const char* function, const Sequence& seq) const;
  std::array<int32_t, 2> needed_entries(int32_t group, int64_t num_computed) const;
  void set_entries(Sequence& seq, int32_t group, int64_t num_computed,
                   std::span<const int32_t> blocks);
  std::vector<int32_t> find_swapped(const Sequence& seq, int64_t num_computed) const;
  void reserve_swapped_in(Sequence& seq, int64_t num_computed, int32_t num_found);
  void publish_companions(Sequence& seq, int64_t num_computed);
  void drop_slots(Sequence& seq);
  void validate_sequence(const Sequence& seq) const;
  void validate_away() const;
  std::vector<int32_t> count_references() const;

  mutable PriorityMutex mutex_;  // of everything below, but for what the constructor sets for good
  mutable YieldedMatch* yielded_ = nullptr;
  BlockAllocator allocator_;
  std::optional<PrefixCache> cache_;
  std::optional<CompanionCache> companions_;  // of more groups than one
  int32_t async_depth_;
  BlockSize block_size_;
  std::vector<Sequence> sequences_;
  std::vector<int32_t> unused_sequences_;
  uint64_t num_visits_ = 0;
  StepBatch batch_;
  std::vector<StepBatch> group_batches_;  // of the groups but the first
  int64_t last_ticket_ = 0;
  int64_t last_retired_ = 0;
  std::vector<Deferred> deferred_;             // in order of tickets
  std::unordered_map<int32_t, int32_t> pins_;  // how often each pinned block is pinned
  bool has_retention_ = false;                 // some sequence had another than the default
  std::optional<BlockTimers> timers_;          // once some sequence had a time to live
  std::optional<int64_t> time_;                // ns; none: the steady clock's
  int64_t prefix_query_tokens_ = 0;
  int64_t prefix_hit_tokens_ = 0;
  int64_t evicted_blocks_ = 0;

  bool is_watched_ = false;  // events or stores, or Eviction::kReuseLru
  std::optional<EventLog> events_;
  mutable std::optional<BlockKeys> keys_;                // where events or stores want them
  std::vector<const KVStore*> stores_;                   // the nearest first
  std::vector<KVTransfer> offloads_, earlier_offloads_;  // the latter: offer_also()
  std::unordered_map<int32_t, Fetch> fetches_;           // by index of the sequence
  std::array<int64_t, 3> fetched_tokens_{};              // by tier
  std::optional<BlockAllocator> host_;
  std::unordered_map<int32_t, Swapped> swapped_;  // by index of the sequence

  // While the loop runs, its sequences' tokens and counts lag behind: settle() brings them up.
  DecodeLoop loop_;
  std::vector<SequenceId> loop_seqs_;    // the rows; or those that the latest commit left ready
  bool loop_stepped_ = false;            // and not committed
  std::vector<int32_t> replaced_ranks_;  // of rows whose latest full block the batch lacks

  // Scratch of one call, kept for its memory.
  std::vector<Sequence*> visited_;
  std::vector<Copy> copies_;
  std::vector<int32_t> new_blocks_;
  mutable std::vector<int32_t> path_;
};

}  // namespace quire
