// SPDX-License-Identifier: Apache-2.0
// How sequences share, shrink and end, and what becomes of the blocks that they give back.
#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <map>
#include <new>
#include <utility>

#include "kv_snapshot/snapshot.h"
#include "quire/error.h"
#include "reserve_more.h"

namespace quire {
namespace {

constexpr int32_t kExpiredLevel = 0;
constexpr int32_t kMinTrunkBlocks = 4;     // fewer are shared one by one
constexpr double kLongestTtl = 1e9;        // seconds; 31 years
constexpr int64_t kInUse = INT64_MAX / 2;  // of a time to live that has not begun

}  // namespace

// ---- Sharing

// Moves a sequence's full computed blocks into a trunk that forks can hold, if they are many
// beyond those of the trunk that it has.
void KVCacheManager::make_trunk(Sequence& seq) {
  const int32_t num_whole = static_cast<int32_t>(seq.num_computed / block_size_);
  if (num_whole - seq.table.num_shared() < kMinTrunkBlocks) return;
  unshare(seq);
  const int64_t num_tokens = int64_t{num_whole} * block_size_;
  auto trunk = std::make_unique<Trunk>();
  trunk->num_holders = 1;
  trunk->blocks = seq.table.ids();
  trunk->blocks.resize(num_whole);
  std::vector<int32_t> rest(seq.tokens.begin() + num_tokens, seq.tokens.end());
  trunk->tokens = std::exchange(seq.tokens, std::move(rest));
  trunk->tokens.resize(num_tokens);
  seq.table.share(trunk->blocks);
  seq.trunk = trunk.release();
}

// Gives up a sequence's hold on its trunk, whose tokens and ids it does not need any more.
void KVCacheManager::drop_trunk(Sequence& seq) {
  Trunk* trunk = std::exchange(seq.trunk, nullptr);
  if (--trunk->num_holders > 0) return;
  for (size_t i = trunk->blocks.size(); i-- > 0;) release(trunk->blocks[i]);
  delete trunk;
}

// Copies what lies in a trunk into the sequence, which then holds all of its blocks itself.
void KVCacheManager::unshare(Sequence& seq) {
  if (!seq.trunk) return;
  reserve_more(seq.tokens, seq.trunk->tokens.size());
  seq.table.reserve_more(seq.table.num_shared());
  for (int32_t block : seq.trunk->blocks) allocator_.share(block);
  seq.tokens.insert(seq.tokens.begin(), seq.trunk->tokens.begin(), seq.trunk->tokens.end());
  seq.table.unshare();
  Trunk* trunk = std::exchange(seq.trunk, nullptr);
  if (--trunk->num_holders > 0) return;
  for (int32_t block : trunk->blocks) allocator_.release(block);  // never the last reference
  delete trunk;
}

SequenceId KVCacheManager::fork(SequenceId parent) {
  const std::lock_guard guard(mutex_);
  SequenceId child;
  fork(parent, {&child, 1});
  return child;
}

void KVCacheManager::fork(SequenceId parent_id, std::span<SequenceId> children) {
  const std::lock_guard guard(mutex_);
  check_here("fork", get(parent_id));
  settle();
  check_no_step("fork", get(parent_id));
  reserve_sequences(children.size());
  Sequence& parent = get(parent_id);
  make_trunk(parent);
  const int32_t num_children = static_cast<int32_t>(children.size());
  const std::span<const int32_t> own =
      parent.table.own_from(parent.table.num_shared())
          .first(parent.table.blocks_for(parent.num_computed) - parent.table.num_shared());
  for (size_t i = 0; i < children.size(); ++i) {
    Sequence& child = unused_sequence(i);
    child.tokens.assign(parent.tokens.begin(), parent.tokens.end());
    child.table.clear();
    if (parent.trunk) child.table.share(parent.trunk->blocks);
    for (int32_t block : own) child.table.append(block);
    if (!companions_) continue;
    child.groups.assign(parent.groups.size(), {BlockTable(block_size_)});
    for (size_t group = 0; group < parent.groups.size(); ++group)
      child.groups[group].table.reserve_more(parent.groups[group].table.size());
  }
  for (int32_t block : own) allocator_.share(block, num_children);
  if (parent.trunk) parent.trunk->num_holders += num_children;
  if (cache_) cache_->hold_root(parent.root, num_children);
  int64_t serial = take_serials(num_children);
  for (SequenceId& id : children) {
    Sequence& child = add_sequence(serial++);
    id = child.id;
    child.retention = parent.retention;
    child.num_computed = child.num_cached = parent.num_computed;
    child.was_attached = true;
    child.trunk = parent.trunk;
    if (companions_) share_groups(parent, child);
    child.root = parent.root;
  }
}

// ---- Shrinking and ending

void KVCacheManager::truncate(SequenceId id, int64_t num_tokens) {
  const std::lock_guard guard(mutex_);
  check_here("truncate", get(id));
  settle();
  Sequence& seq = get(id);
  QUIRE_CHECK_ARG(num_tokens >= 1 && num_tokens <= seq.num_tokens(),
                  "truncate: num_tokens: expected 1 to ", seq.num_tokens(), ", got ", num_tokens);
  reserve_releases(num_held(seq));
  if (companions_ && !groups_reach(seq, num_tokens)) {
    reserve_path(seq, num_tokens);
    detach(id);
    seq.tokens.resize(num_tokens);
    return attach(id);
  }
  if (num_tokens < seq.num_trunk_tokens()) unshare(seq);
  const int64_t end = std::min(seq.num_computed + seq.num_planned, num_tokens);
  seq.tokens.resize(num_tokens - seq.num_trunk_tokens());
  seq.num_computed = std::min(seq.num_computed, num_tokens);
  seq.num_planned = end - seq.num_computed;
  trim(seq, seq.table.blocks_for(end));
  if (companions_) trim_groups(seq, seq.table.blocks_for(end));
}

void KVCacheManager::free(std::span<const SequenceId> seqs) {
  const std::lock_guard guard(mutex_);
  visit("free", seqs);
  for (const Sequence* seq : visited_)
    if (seq->away == Away::kFetching) check_here("free", *seq);
  settle();
  int64_t num_released = 0;
  for (const Sequence* seq : visited_) num_released += num_held(*seq);
  reserve_releases(num_released);
  for (Sequence* seq : visited_) {
    if (seq->away == Away::kSwapped) drop_slots(*seq);
    give_back(*seq);
    if (cache_) cache_->close_root(seq->root);
    remove_sequence(*seq);
  }
}

// Gives back all blocks but the first, which reach beyond the trunk; the last goes first, so that
// leaves are evicted first.
void KVCacheManager::trim(Sequence& seq, int32_t num_blocks) {
  if (num_blocks >= seq.table.size()) return;
  const std::span<const int32_t> blocks = seq.table.own_from(num_blocks);
  if (has_retention_)
    for (int32_t block : blocks) retain(seq.retention, block);
  const bool is_simple =
      (!timers_ || timers_->empty()) && (async_depth_ == 0 || last_ticket_ == last_retired_);
  if (is_simple)
    allocator_.release(blocks);
  else
    for (size_t i = blocks.size(); i-- > 0;) release(blocks[i]);
  seq.table.truncate(num_blocks);
}

// Gives back all blocks of a sequence that is about to end or to wait. It keeps its tokens if there
// is room for those of its trunk.
void KVCacheManager::give_back(Sequence& seq) {
  keep_partial_block(seq);
  trim(seq, seq.table.num_shared());
  if (seq.trunk) {
    for (int32_t block : seq.trunk->blocks) retain(seq.retention, block);
    if (seq.tokens.capacity() - seq.tokens.size() >= seq.trunk->tokens.size())
      seq.tokens.insert(seq.tokens.begin(), seq.trunk->tokens.begin(), seq.trunk->tokens.end());
    drop_trunk(seq);
  }
  seq.table.clear();
  if (companions_) trim_groups(seq, 0);
}

// Caches the computed tokens of a last, partial block that nobody else holds. Nobody writes to it
// any more: it is about to be given back.
void KVCacheManager::keep_partial_block(Sequence& seq) {
  const int32_t count = static_cast<int32_t>(seq.num_computed % block_size_);
  if (!cache_ || companions_ || count == 0 || shares_last_block(seq)) return;
  const int32_t index = static_cast<int32_t>(seq.num_computed / block_size_);
  const int32_t parent = index == 0 ? seq.root : seq.table[index - 1];
  const int32_t block = seq.table[index];
  const int32_t* tokens = seq.tokens_from(seq.num_computed - count);
  try {
    if (cache_->insert(parent, tokens, count, block) != block) return;
  } catch (const std::bad_alloc&) {  // not worth failing for
    return;
  }
  allocator_.mark_cached(block);
  on_stored(block, {tokens, static_cast<size_t>(count)});
}

// ---- Blocks on their way back

void KVCacheManager::set_time(int64_t ns) {
  const std::lock_guard guard(mutex_);
  QUIRE_CHECK_ARG(ns >= 0 && ns <= int64_t{1} << 60, "set_time: ns: expected 0 to 2^60, got ", ns);
  time_ = ns;
}

int64_t KVCacheManager::now_ns() const {
  if (time_) return *time_;
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// Says how long a cached block, which a sequence is about to give back, is worth keeping.
void KVCacheManager::retain(const Retention& retention, int32_t block) {
  if (!has_retention_ || !allocator_.is_cached(block)) return;
  const int32_t level = BlockAllocator::kStartLevel + retention.priority;
  if (level < allocator_.level(block)) return;
  allocator_.set_level(block, level);
  if (timers_) timers_->erase(block);
  if (std::isfinite(retention.ttl)) timers_->set_ttl(block, retention.ttl);
}

// Asks for the memory that so many calls of release() take.
void KVCacheManager::reserve_releases(int64_t count) {
  if (async_depth_ > 0) reserve_more(deferred_, static_cast<size_t>(count));
}

// At most so many references does a sequence give back, all its groups' together.
int64_t KVCacheManager::num_held(const Sequence& seq) {
  int64_t count = seq.table.size();
  for (const GroupTable& group : seq.groups) count += group.table.size();
  return count;
}

void KVCacheManager::release(int32_t block) {
  if (last_ticket_ > last_retired_ && async_depth_ > 0)
    deferred_.push_back({last_ticket_, block});
  else
    release_now(block);
}

void KVCacheManager::release_now(int32_t block) {
  allocator_.release(block);
  if (!timers_ || !timers_->contains(block) || allocator_.refcount(block) > 0) return;
  const double seconds = std::min(timers_->ttl(block), kLongestTtl);
  timers_->start(block, now_ns() + static_cast<int64_t>(seconds * 1e9));
}

// Blocks that nobody used for their time to live are the first to be evicted from now on.
void KVCacheManager::expire() {
  if (!timers_ || timers_->first() < 0) return;
  const int64_t now = now_ns();
  for (int32_t block; (block = timers_->first()) >= 0 && timers_->deadline(block) <= now;) {
    timers_->stop(block);
    if (allocator_.refcount(block) > 0) continue;  // the next release() counts
    timers_->erase(block);
    allocator_.set_level(block, kExpiredLevel);
  }
}

void KVCacheManager::retire(int64_t ticket) {
  const std::lock_guard guard(mutex_);
  QUIRE_CHECK_ARG(async_depth_ > 0, "retire: expected a manager with async_depth > 0");
  QUIRE_CHECK_ARG(ticket > last_retired_ && ticket <= last_ticket_,
                  "retire: ticket: expected one of a step that still runs, ", last_retired_ + 1,
                  " to ", last_ticket_, ", got ", ticket);
  last_retired_ = ticket;
  auto due = deferred_.begin();
  for (; due != deferred_.end() && due->ticket <= ticket; ++due) release_now(due->block);
  deferred_.erase(deferred_.begin(), due);
}

int64_t KVCacheManager::num_deferred_refs() const {
  const std::lock_guard guard(mutex_);
  return static_cast<int64_t>(deferred_.size());
}

// ---- In snapshots

// Pins, times to live as what is left of them, and references that wait for retire().
void KVCacheManager::save_retention(Snapshot& out) const {
  snapshot::Numbers &pins = out["pins"], &expiries = out["expiries"], &deferred = out["deferred"];
  for (const auto& [block, count] : std::map(pins_.begin(), pins_.end()))
    pins.insert(pins.end(), {block, count});
  for (int32_t block = 0; timers_ && block < allocator_.num_blocks(); ++block) {
    if (!timers_->contains(block)) continue;
    const int64_t deadline = timers_->deadline(block);
    const int64_t left = deadline == 0 ? kInUse : deadline - now_ns();
    expiries.insert(expiries.end(), {block, std::bit_cast<int64_t>(timers_->ttl(block)), left});
  }
  for (const Deferred& entry : deferred_)
    deferred.insert(deferred.end(), {entry.ticket, entry.block});
  out["has_retention"] = {has_retention_};
}

void KVCacheManager::load_retention(const Snapshot& in) {
  const int32_t last_block = allocator_.num_blocks() - 1;
  for (snapshot::Reader reader(in, "pins"); !reader.is_at_end();) {
    const int32_t block = reader.next_int32(0, last_block);
    pins_[block] = reader.next_int32(1);
  }
  std::unordered_map<int32_t, int64_t> num_beyond;  // of a block's pins those that reach a child
  for (const auto& [block, count] : pins_)
    if (const int32_t parent = cache_ ? cache_->parent(block) : -1; parent >= 0)
      num_beyond[parent] += count;
  for (const auto& [block, count] : num_beyond)
    QUIRE_INVARIANT(pins_.contains(block) && count <= pins_[block], "block ", block, ": ", count,
                    " pins of its children, and fewer of its own");
  has_retention_ = snapshot::Reader(in, "has_retention").next(0, 1) != 0;
  snapshot::Reader expiries(in, "expiries");
  const bool has_ttl = std::any_of(sequences_.begin(), sequences_.end(), [](const Sequence& seq) {
    return std::isfinite(seq.retention.ttl);
  });
  if (has_ttl || !expiries.is_at_end()) timers_.emplace(allocator_.num_blocks());
  while (!expiries.is_at_end()) {
    const int32_t block = expiries.next_int32(0, last_block);
    const double ttl = std::bit_cast<double>(expiries.next());
    if (!(ttl >= 0)) expiries.refuse("times to live of 0 or more");
    timers_->set_ttl(block, ttl);
    const int64_t left = expiries.next(INT64_MIN / 2, INT64_MAX / 2);
    if (left != kInUse) timers_->start(block, now_ns() + left);
  }
  for (snapshot::Reader reader(in, "deferred"); !reader.is_at_end();) {
    const int64_t ticket = reader.next(last_retired_ + 1, last_ticket_);
    deferred_.push_back({ticket, reader.next_int32(0, last_block)});
  }
}

}  // namespace quire
