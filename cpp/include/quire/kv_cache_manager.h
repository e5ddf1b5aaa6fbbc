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
// Every function either does all it says or throws InvalidArgument and changes nothing.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quire/block_allocator.h"
#include "quire/block_table.h"
#include "quire/prefix_cache.h"
#include "quire/step_batch.h"

namespace quire {

// A safe handle: one that was freed, or comes from another manager, is refused.
struct SequenceId {
  int32_t index = -1;
  int64_t serial = 0;  // unique in the process
};

// A prefix that create() would find. It may end inside a block, whose leading tokens are copied.
// The idle ones of its whole blocks are in nobody's use: they count as available until someone
// takes the prefix.
struct PrefixMatch {
  int64_t num_tokens = 0;
  int32_t num_idle_blocks = 0;
};

// Block counts add up: free + used + cached == num_blocks.
struct KVCacheStats {
  int32_t num_blocks, block_size;
  int32_t free_blocks, used_blocks, cached_blocks;
  int32_t high_water_blocks;    // most blocks ever used at once
  int64_t deferred_refs;        // references that wait for retire(); their blocks count as used
  int64_t used_tokens;          // computed tokens of live sequences, in shared blocks once
  int64_t waste_tokens;         // room in used blocks beyond those
  int64_t prefix_query_tokens;  // asked of the prefix cache by create(),
  int64_t prefix_hit_tokens;    // and found in it
  int64_t evicted_blocks;       // cached blocks whose contents were given up
};

class KVCacheManager {
 public:
  // async_depth: how many steps may run while the host plans on; 0: the host waits for each.
  KVCacheManager(int32_t num_blocks, int32_t block_size, bool prefix_caching = true,
                 int32_t async_depth = 0);
  KVCacheManager(const KVCacheManager&) = delete;

  // A sequence of these tokens. Takes references on the cached prefix, and leaves at least the
  // last token to compute.
  SequenceId create(std::span<const int32_t> token_ids, Salt salt = {});

  // Gives slots to the next num_new_tokens[i] known tokens of each sequence. Null when out of
  // blocks: then nothing has changed. A second step without commit() plans the same tokens again.
  const StepBatch* step(std::span<const SequenceId> seqs, std::span<const int32_t> num_new_tokens);

  // The KV of the planned tokens is written. `sampled` holds new token ids, num_sampled[i] of each
  // sequence; without num_sampled one of each, or none at all.
  void commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled = {},
              std::span<const int32_t> num_sampled = {});

  // A sequence of the same tokens that shares every block with computed tokens. The first write
  // to a shared partial block copies it, whoever writes.
  SequenceId fork(SequenceId seq);

  // Keeps the first num_tokens tokens, 1 or more.
  void truncate(SequenceId seq, int64_t num_tokens);
  void free(std::span<const SequenceId> seqs);

  // The step of this ticket, and so every earlier one, has run. Blocks that were freed or copied
  // from meanwhile rejoin the pool.
  void retire(int64_t ticket);

  // What create() would find; no side effect.
  PrefixMatch match(std::span<const int32_t> token_ids, Salt salt = {}) const;

  // For schedulers. A sequence may be known without holding blocks: open() makes one so, attach()
  // takes the cached prefix (create() is both), detach() gives all blocks back and keeps the
  // tokens.
  SequenceId open(std::span<const int32_t> token_ids, Salt salt = {});
  void attach(SequenceId seq);
  void detach(SequenceId seq);
  PrefixMatch match(SequenceId seq) const;
  // How many leading tokens of the two could lie in the same blocks.
  int64_t shareable_tokens(SequenceId a, SequenceId b) const;
  // New blocks that a sequence needs to compute its first num_tokens tokens, a copy of its last
  // block included where it shares that.
  int32_t num_missing_blocks(SequenceId seq, int64_t num_tokens) const;

  std::span<const int32_t> tokens(SequenceId seq) const { return get(seq).tokens; }
  std::span<const int32_t> block_table(SequenceId seq) const { return get(seq).table.ids(); }
  int64_t num_tokens(SequenceId seq) const { return get(seq).num_tokens(); }
  int64_t num_computed_tokens(SequenceId seq) const { return get(seq).num_computed; }
  int64_t num_cached_tokens(SequenceId seq) const { return get(seq).num_cached; }  // from the cache

  // False: async_depth steps run, one must be retired first.
  bool may_step() const { return async_depth_ == 0 || last_ticket_ - last_retired_ < async_depth_; }
  const BlockAllocator& allocator() const { return allocator_; }
  const StepBatch& batch() const { return batch_; }  // of the latest step
  bool prefix_caching() const { return cache_.has_value(); }
  int64_t num_deferred_refs() const { return static_cast<int64_t>(deferred_.size()); }
  int32_t num_sequences() const;
  KVCacheStats stats() const;

  // Walks everything; throws InvariantError.
  void validate() const;

 private:
  struct Sequence {
    int64_t serial = 0;  // 0: an unused entry
    int32_t root = 0;    // of the prefix cache
    bool was_attached = false;
    int64_t num_computed = 0;
    int64_t num_planned = 0;  // beyond num_computed
    int64_t num_cached = 0;
    uint64_t visit = 0;  // the latest call that named this sequence
    std::vector<int32_t> tokens;
    BlockTable table{1};
    int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
  };
  struct Copy {  // copy-on-write of a sequence's last, partial block
    Sequence* seq;
    int32_t index;  // into its table
    int32_t source;
    bool dropped;           // the reference on the source is given up already
    bool in_place = false;  // no copy: the source leaves the prefix cache instead
  };
  struct Deferred {
    int64_t ticket;
    int32_t block;
  };

  bool is_live(SequenceId id) const;
  const Sequence& get(SequenceId id) const;
  Sequence& get(SequenceId id);
  void visit(const char* function, std::span<const SequenceId> seqs);
  Sequence& add_sequence(SequenceId* id);

  template <class Visit>
  int64_t walk_prefix(int32_t root, std::span<const int32_t> tokens, Visit visit) const;
  bool shares_last_block(const Sequence& seq) const;
  PrefixMatch match(int32_t root, std::span<const int32_t> tokens) const;

  struct StepNeed {
    int64_t num_blocks = 0;
    int64_t num_new_tokens = 0;
    int32_t max_blocks = 0;
  };
  StepNeed check_step(std::span<const int32_t> num_new_tokens);
  void plan_copies(std::span<const int32_t> num_new_tokens);
  void undo_copies();
  int64_t take_over(int64_t num_short);
  bool allocate(int64_t num_blocks);
  int32_t evict(int32_t victim);
  std::span<const int32_t> apply_copies();

  void advance(Sequence& seq);
  void publish(Sequence& seq, int32_t index);
  void keep_partial_block(Sequence& seq);
  void trim(Sequence& seq, int32_t num_blocks);
  void release(int32_t block);
  int64_t count_used_tokens() const;
  void validate_sequence(const Sequence& seq) const;

  BlockAllocator allocator_;
  std::optional<PrefixCache> cache_;
  int32_t async_depth_;
  int32_t block_size_;
  std::vector<Sequence> sequences_;
  std::vector<int32_t> unused_sequences_;
  uint64_t num_visits_ = 0;
  StepBatch batch_;
  int64_t last_ticket_ = 0;
  int64_t last_retired_ = 0;
  std::deque<Deferred> deferred_;  // in order of tickets
  int64_t prefix_query_tokens_ = 0;
  int64_t prefix_hit_tokens_ = 0;
  int64_t evicted_blocks_ = 0;

  // Scratch of one call, kept for its memory.
  std::vector<Sequence*> visited_;
  std::vector<Copy> copies_;
  std::vector<int32_t> new_blocks_;
};

}  // namespace quire
