// SPDX-License-Identifier: Apache-2.0
// Each public function checks all of its arguments first and changes state only afterwards.
#include "quire/kv_cache_manager.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "quire/error.h"

namespace quire {
namespace {

constexpr char kNotLive[] =
    "expected a live sequence of this manager, got one that was freed or belongs to another";

int64_t next_serial() {
  static std::atomic<int64_t> last{0};
  return ++last;
}

}  // namespace

KVCacheManager::KVCacheManager(int32_t num_blocks, int32_t block_size, bool prefix_caching,
                               int32_t async_depth)
    : allocator_(num_blocks, block_size), async_depth_(async_depth), block_size_(block_size) {
  QUIRE_CHECK_ARG(async_depth >= 0, "KVCacheManager: async_depth: expected 0 or more, got ",
                  async_depth);
  if (prefix_caching) cache_.emplace(num_blocks, block_size);
}

// ---- Handles

bool KVCacheManager::is_live(SequenceId id) const {
  return id.index >= 0 && static_cast<size_t>(id.index) < sequences_.size() && id.serial != 0 &&
         sequences_[id.index].serial == id.serial;
}

const KVCacheManager::Sequence& KVCacheManager::get(SequenceId id) const {
  QUIRE_CHECK_ARG(is_live(id), "KVCacheManager: seq: ", kNotLive);
  return sequences_[id.index];
}

KVCacheManager::Sequence& KVCacheManager::get(SequenceId id) {
  return const_cast<Sequence&>(std::as_const(*this).get(id));
}

// The sequences of a call, in visited_; each at most once.
void KVCacheManager::visit(const char* function, std::span<const SequenceId> seqs) {
  visited_.clear();
  ++num_visits_;
  for (SequenceId id : seqs) {
    QUIRE_CHECK_ARG(is_live(id), function, ": seqs[", visited_.size(), "]: ", kNotLive);
    Sequence& seq = sequences_[id.index];
    QUIRE_CHECK_ARG(seq.visit != num_visits_, function, ": seqs[", visited_.size(),
                    "]: expected each sequence once, got one twice");
    seq.visit = num_visits_;
    visited_.push_back(&seq);
  }
}

KVCacheManager::Sequence& KVCacheManager::add_sequence(SequenceId* id) {
  if (unused_sequences_.empty()) {
    unused_sequences_.push_back(static_cast<int32_t>(sequences_.size()));
    sequences_.emplace_back();
  }
  *id = {unused_sequences_.back(), next_serial()};
  unused_sequences_.pop_back();
  Sequence& seq = sequences_[id->index];
  seq.serial = id->serial;
  seq.table = BlockTable(block_size_);
  return seq;
}

int32_t KVCacheManager::num_sequences() const {
  return static_cast<int32_t>(sequences_.size() - unused_sequences_.size());
}

// ---- Prefixes

// Calls visit(block, num_tokens) for each cached block of the longest cached prefix of `tokens`
// that leaves a token to compute; the last may be one of which only some leading tokens are equal.
// Returns the length of that prefix in tokens.
template <class Visit>
int64_t KVCacheManager::walk_prefix(int32_t root, std::span<const int32_t> tokens,
                                    Visit visit) const {
  if (!cache_ || root == PrefixCache::kNone) return 0;
  const int64_t most = static_cast<int64_t>(tokens.size()) - 1;
  int64_t num_cached = 0;
  for (int32_t parent = root; num_cached < most;) {
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(most - num_cached, block_size_));
    const PrefixCache::Match found = cache_->find(parent, &tokens[num_cached], count);
    if (found.num_tokens == 0) break;
    visit(found.block, found.num_tokens);
    num_cached += found.num_tokens;
    if (found.num_tokens < block_size_) break;
    parent = found.block;
  }
  return num_cached;
}

PrefixMatch KVCacheManager::match(int32_t root, std::span<const int32_t> tokens) const {
  PrefixMatch result;
  result.num_tokens = walk_prefix(root, tokens, [&](int32_t block, int32_t num_tokens) {
    result.num_idle_blocks += num_tokens == block_size_ && allocator_.refcount(block) == 0;
  });
  return result;
}

PrefixMatch KVCacheManager::match(std::span<const int32_t> token_ids, Salt salt) const {
  return match(cache_ ? cache_->find_root(salt) : PrefixCache::kNone, token_ids);
}

PrefixMatch KVCacheManager::match(SequenceId id) const {
  const Sequence& seq = get(id);
  return match(seq.root, seq.tokens);
}

int64_t KVCacheManager::shareable_tokens(SequenceId a, SequenceId b) const {
  const Sequence& first = get(a);
  const Sequence& second = get(b);
  if (!cache_ || first.root != second.root) return 0;
  const auto [end, unused] = std::mismatch(first.tokens.begin(), first.tokens.end(),
                                           second.tokens.begin(), second.tokens.end());
  const int64_t num_equal = end - first.tokens.begin();
  return num_equal / block_size_ * block_size_;
}

SequenceId KVCacheManager::create(std::span<const int32_t> token_ids, Salt salt) {
  const SequenceId id = open(token_ids, salt);
  attach(id);
  return id;
}

SequenceId KVCacheManager::open(std::span<const int32_t> token_ids, Salt salt) {
  QUIRE_CHECK_ARG(!token_ids.empty(), "create: token_ids: expected 1 token or more, got none");
  QUIRE_CHECK_ARG(token_ids.size() <= INT32_MAX, "create: token_ids: expected less than 2^31, got ",
                  token_ids.size());
  SequenceId id;
  Sequence& seq = add_sequence(&id);
  seq.tokens.assign(token_ids.begin(), token_ids.end());
  if (cache_) seq.root = cache_->open_root(salt);
  return id;
}

void KVCacheManager::attach(SequenceId id) {
  Sequence& seq = get(id);
  QUIRE_CHECK_ARG(seq.table.size() == 0, "attach: seq: expected one without blocks, got ",
                  seq.table.size(), " blocks");
  seq.num_cached = walk_prefix(seq.root, seq.tokens, [&](int32_t block, int32_t) {
    allocator_.share(block);
    seq.table.append(block);
  });
  seq.num_computed = seq.num_cached;
  if (cache_ && !seq.was_attached) {  // a sequence that comes back is not a query of its own
    prefix_query_tokens_ += seq.num_tokens();
    prefix_hit_tokens_ += seq.num_cached;
  }
  seq.was_attached = true;
}

void KVCacheManager::detach(SequenceId id) {
  Sequence& seq = get(id);
  keep_partial_block(seq);
  trim(seq, 0);
  seq.num_computed = seq.num_planned = 0;
}

// Whether the next token lies in a block that others see too: other holders, or the prefix cache.
bool KVCacheManager::shares_last_block(const Sequence& seq) const {
  if (seq.num_computed % block_size_ == 0) return false;
  const int32_t block = seq.table[static_cast<int32_t>(seq.num_computed / block_size_)];
  return allocator_.refcount(block) > 1 || allocator_.is_cached(block);
}

int32_t KVCacheManager::num_missing_blocks(SequenceId id, int64_t num_tokens) const {
  const Sequence& seq = get(id);
  const bool copies = num_tokens > seq.num_computed && shares_last_block(seq);
  return std::max(0, seq.table.blocks_for(num_tokens) - seq.table.size()) + copies;
}

// ---- Steps

// Checks each count against its sequence in visited_ and adds up what the step needs.
KVCacheManager::StepNeed KVCacheManager::check_step(std::span<const int32_t> num_new_tokens) {
  QUIRE_CHECK_ARG(num_new_tokens.size() == visited_.size(),
                  "step: num_new_tokens: expected one count a sequence, ", visited_.size(),
                  ", got ", num_new_tokens.size());
  QUIRE_CHECK_ARG(may_step(), "step: expected at most async_depth=", async_depth_,
                  " steps at a time; retire() the oldest first");
  StepNeed need;
  for (size_t i = 0; i < visited_.size(); ++i) {
    const Sequence& seq = *visited_[i];
    const int32_t count = num_new_tokens[i];
    QUIRE_CHECK_ARG(count >= 0 && count <= seq.num_tokens() - seq.num_computed,
                    "step: num_new_tokens[", i, "]: expected 0 to ",
                    seq.num_tokens() - seq.num_computed, " (known and not computed), got ", count);
    const int32_t num_blocks = seq.table.blocks_for(seq.num_computed + count);
    need.num_blocks += std::max(0, num_blocks - seq.table.size());
    need.max_blocks = std::max(need.max_blocks, num_blocks);
    need.num_new_tokens += count;
  }
  return need;
}

// Finds the writes into blocks that others see too. The last holder of a block that is not cached
// may write in place, so references are given up as the copies are found. While steps run, the
// sources stay referenced until this step is retired.
void KVCacheManager::plan_copies(std::span<const int32_t> num_new_tokens) {
  copies_.clear();
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    if (num_new_tokens[i] == 0 || !shares_last_block(seq)) continue;
    const int32_t index = static_cast<int32_t>(seq.num_computed / block_size_);
    const int32_t block = seq.table[index];
    const bool dropped = allocator_.refcount(block) > 1 && async_depth_ == 0;
    if (dropped) allocator_.release(block);
    copies_.push_back({&seq, index, block, dropped});
  }
}

void KVCacheManager::undo_copies() {
  for (const Copy& copy : copies_)
    if (copy.dropped) allocator_.share(copy.source);
}

// When blocks run out, a cached block that one sequence alone holds is given up to it instead of
// copied. (All idle blocks are evicted by then, so it has no children left.) Returns how many of
// the missing blocks that saves.
int64_t KVCacheManager::take_over(int64_t num_short) {
  int64_t num_saved = 0;
  for (Copy& copy : copies_) {
    if (num_saved == num_short) break;
    copy.in_place = !copy.dropped && allocator_.refcount(copy.source) == 1;
    num_saved += copy.in_place;
  }
  return num_saved;
}

// Takes the blocks of a whole step into new_blocks_, or none.
bool KVCacheManager::allocate(int64_t num_blocks) {
  if (num_blocks > allocator_.num_available()) return false;
  new_blocks_.resize(num_blocks);
  return allocator_.allocate(new_blocks_, [this](int32_t victim) { return evict(victim); });
}

// Gives up what a cached block holds, and first what depends on it: returns the block to take.
int32_t KVCacheManager::evict(int32_t victim) {
  while (cache_->has_children(victim)) victim = cache_->any_child(victim);
  cache_->erase(victim);
  ++evicted_blocks_;
  return victim;
}

// Moves the copying sequences to the first of new_blocks_; returns the others.
std::span<const int32_t> KVCacheManager::apply_copies() {
  size_t num_taken = 0;
  for (const Copy& copy : copies_) {
    if (copy.in_place) {
      allocator_.unmark_cached(evict(copy.source));
      continue;
    }
    const int32_t block = new_blocks_[num_taken++];
    batch_.add_copy(copy.source, block);
    copy.seq->table.replace(copy.index, block);
    if (!copy.dropped) release(copy.source);
  }
  return std::span(new_blocks_).subspan(num_taken);
}

const StepBatch* KVCacheManager::step(std::span<const SequenceId> seqs,
                                      std::span<const int32_t> num_new_tokens) {
  visit("step", seqs);
  const StepNeed need = check_step(num_new_tokens);
  plan_copies(num_new_tokens);
  const int64_t num_blocks = need.num_blocks + static_cast<int64_t>(copies_.size());
  const int64_t num_short = std::max<int64_t>(0, num_blocks - allocator_.num_available());
  if (!allocate(num_blocks - take_over(num_short))) {
    undo_copies();
    return nullptr;
  }
  batch_.begin(++last_ticket_, static_cast<int32_t>(seqs.size()), need.max_blocks,
               need.num_new_tokens, static_cast<int64_t>(copies_.size()));
  std::span<const int32_t> fresh = apply_copies();
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    const int64_t end = seq.num_computed + num_new_tokens[i];
    const int32_t num_missing = std::max(0, seq.table.blocks_for(end) - seq.table.size());
    seq.table.append(fresh.first(num_missing));
    fresh = fresh.subspan(num_missing);
    seq.num_planned = num_new_tokens[i];
    batch_.add_row(seq.serial, seq.table, seq.num_computed, end);
  }
  return &batch_;
}

// ---- Commit

void KVCacheManager::commit(std::span<const SequenceId> seqs, std::span<const int32_t> sampled,
                            std::span<const int32_t> num_sampled) {
  visit("commit", seqs);
  const bool one_each = num_sampled.empty() && !sampled.empty();
  QUIRE_CHECK_ARG(num_sampled.empty() || num_sampled.size() == seqs.size(),
                  "commit: sampled: expected tokens of ", seqs.size(), " sequences, got of ",
                  num_sampled.size());
  const auto count_of = [&](size_t i) { return num_sampled.empty() ? one_each : num_sampled[i]; };
  int64_t total = 0;
  for (size_t i = 0; i < visited_.size(); ++i) {
    const Sequence& seq = *visited_[i];
    const int32_t count = count_of(i);
    QUIRE_CHECK_ARG(count >= 0, "commit: num_sampled[", i, "]: expected 0 or more, got ", count);
    QUIRE_CHECK_ARG(count == 0 || seq.num_planned == 0 ||
                        seq.num_computed + seq.num_planned == seq.num_tokens(),
                    "commit: sampled: expected no token for seqs[", i, "], whose step left ",
                    seq.num_tokens() - seq.num_computed - seq.num_planned,
                    " known tokens to compute");
    total += count;
  }
  QUIRE_CHECK_ARG(total == static_cast<int64_t>(sampled.size()), "commit: sampled: expected ",
                  total, " tokens, got ", sampled.size());
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    advance(seq);
    const int32_t count = count_of(i);
    seq.tokens.insert(seq.tokens.end(), sampled.begin(), sampled.begin() + count);
    sampled = sampled.subspan(count);
  }
}

// Planned tokens become computed ones.
void KVCacheManager::advance(Sequence& seq) {
  const int64_t end = seq.num_computed + seq.num_planned;
  if (cache_ && seq.num_planned > 0)
    for (int64_t i = seq.num_computed / block_size_; i < end / block_size_; ++i)
      publish(seq, static_cast<int32_t>(i));
  seq.num_computed = end;
  seq.num_planned = 0;
}

// Caches a block that has become full, or swaps it for the cached one of the same tokens. So a
// parent in the tree is always held by whoever holds its child, and the LRU list has children
// ahead of their parents.
void KVCacheManager::publish(Sequence& seq, int32_t index) {
  const int32_t block = seq.table[index];
  const int32_t parent = index == 0 ? seq.root : seq.table[index - 1];
  const int32_t cached =
      cache_->insert(parent, &seq.tokens[int64_t{index} * block_size_], block_size_, block);
  if (cached == block) {
    allocator_.mark_cached(block);
    return;
  }
  allocator_.share(cached);
  seq.table.replace(index, cached);
  release(block);
}

// ---- Giving back

void KVCacheManager::release(int32_t block) {
  if (last_ticket_ > last_retired_ && async_depth_ > 0)
    deferred_.push_back({last_ticket_, block});
  else
    allocator_.release(block);
}

// Caches the computed tokens of a last, partial block that nobody else holds. Nobody writes to it
// any more: it is about to be given back.
void KVCacheManager::keep_partial_block(Sequence& seq) {
  const int32_t count = static_cast<int32_t>(seq.num_computed % block_size_);
  if (!cache_ || count == 0 || shares_last_block(seq)) return;
  const int32_t index = static_cast<int32_t>(seq.num_computed / block_size_);
  const int32_t parent = index == 0 ? seq.root : seq.table[index - 1];
  const int32_t block = seq.table[index];
  if (cache_->insert(parent, &seq.tokens[int64_t{index} * block_size_], count, block) == block)
    allocator_.mark_cached(block);
}

// Gives back all blocks but the first; the last goes first, so that leaves are evicted first.
void KVCacheManager::trim(Sequence& seq, int32_t num_blocks) {
  for (int32_t i = seq.table.size() - 1; i >= num_blocks; --i) release(seq.table[i]);
  seq.table.truncate(std::min(num_blocks, seq.table.size()));
}

SequenceId KVCacheManager::fork(SequenceId parent_id) {
  get(parent_id);
  SequenceId id;
  Sequence& child = add_sequence(&id);
  const Sequence& parent = get(parent_id);
  child.tokens = parent.tokens;
  child.num_computed = child.num_cached = parent.num_computed;
  child.was_attached = true;
  child.table = parent.table.fork(parent.table.blocks_for(parent.num_computed));
  for (int32_t block : child.table.ids()) allocator_.share(block);
  if (cache_) {
    child.root = parent.root;
    cache_->hold_root(child.root);
  }
  return id;
}

void KVCacheManager::truncate(SequenceId id, int64_t num_tokens) {
  Sequence& seq = get(id);
  QUIRE_CHECK_ARG(num_tokens >= 1 && num_tokens <= seq.num_tokens(),
                  "truncate: num_tokens: expected 1 to ", seq.num_tokens(), ", got ", num_tokens);
  const int64_t end = std::min(seq.num_computed + seq.num_planned, num_tokens);
  seq.tokens.resize(num_tokens);
  seq.num_computed = std::min(seq.num_computed, num_tokens);
  seq.num_planned = end - seq.num_computed;
  trim(seq, seq.table.blocks_for(end));
}

void KVCacheManager::free(std::span<const SequenceId> seqs) {
  visit("free", seqs);
  for (size_t i = 0; i < visited_.size(); ++i) {
    Sequence& seq = *visited_[i];
    keep_partial_block(seq);
    trim(seq, 0);
    if (cache_) cache_->close_root(seq.root);
    seq = Sequence{};
    unused_sequences_.push_back(seqs[i].index);
  }
}

void KVCacheManager::retire(int64_t ticket) {
  QUIRE_CHECK_ARG(async_depth_ > 0, "retire: expected a manager with async_depth > 0");
  QUIRE_CHECK_ARG(ticket > last_retired_ && ticket <= last_ticket_,
                  "retire: ticket: expected one of a step that still runs, ", last_retired_ + 1,
                  " to ", last_ticket_, ", got ", ticket);
  last_retired_ = ticket;
  for (; !deferred_.empty() && deferred_.front().ticket <= ticket; deferred_.pop_front())
    allocator_.release(deferred_.front().block);
}

}  // namespace quire
