// SPDX-License-Identifier: Apache-2.0
// Handles, prefixes, and how sequences begin. Each public function checks all of its arguments
// first and changes state only afterwards.
#include "quire/kv_cache_manager.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <utility>

#include "quire/error.h"
#include "reserve_more.h"

namespace quire {
namespace {

constexpr char kNotLive[] =
    "expected a live sequence of this manager, got one that was freed or belongs to another";
constexpr size_t kMaxSequences = size_t{1} << SequenceId::kIndexBits;
constexpr size_t kKeptCapacity = 4096;  // tokens: what an unused entry may keep
constexpr size_t kSpareCapacity = 512;  // tokens that a new sequence may gain and not move

std::atomic<int64_t> last_serial{0};

void check_retention(const Retention& retention) {
  QUIRE_CHECK_ARG(retention.priority >= 0 && retention.priority <= Retention::kMaxPriority,
                  "create: priority: expected 0 to ", Retention::kMaxPriority, ", got ",
                  retention.priority);
  QUIRE_CHECK_ARG(retention.ttl >= 0, "create: ttl: expected seconds, 0 or more, got ",
                  retention.ttl);
}

}  // namespace

KVCacheManager::KVCacheManager(int32_t num_blocks, int32_t block_size, bool prefix_caching,
                               int32_t async_depth, const KVCacheOptions& options)
    : allocator_(num_blocks, block_size, options.eviction),
      async_depth_(async_depth),
      block_size_(block_size) {
  QUIRE_CHECK_ARG(async_depth >= 0, "KVCacheManager: async_depth: expected 0 or more, got ",
                  async_depth);
  QUIRE_CHECK_ARG(options.event_capacity >= 0,
                  "KVCacheManager: event_capacity: expected 0 or more, got ",
                  options.event_capacity);
  if (!options.groups.empty()) {
    CompanionCache companions(options.groups, num_blocks, block_size);
    group_batches_.resize(companions.num_groups() - 1);
    if (companions.num_groups() > 1) companions_ = std::move(companions);
  }
  QUIRE_CHECK_ARG(options.num_host_blocks >= 0,
                  "KVCacheManager: num_host_blocks: expected 0 or more, got ",
                  options.num_host_blocks);
  if (options.num_host_blocks > 0) host_.emplace(options.num_host_blocks, block_size);
  if (!prefix_caching) return;
  cache_.emplace(num_blocks, block_size);
  if (options.event_capacity > 0) {
    events_.emplace(options.event_capacity);
    keys_.emplace(num_blocks, block_size);
  }
  is_watched_ = events_ || options.eviction == Eviction::kReuseLru;
}

KVCacheManager::~KVCacheManager() {
  for (Sequence& seq : sequences_)
    if (seq.trunk && --seq.trunk->num_holders == 0) delete seq.trunk;
}

// ---- Handles

// New sequences come after those of a snapshot.
void KVCacheManager::reserve_serials(int64_t last) {
  int64_t known = last_serial.load();
  while (known < last && !last_serial.compare_exchange_weak(known, last)) {
  }
}

bool KVCacheManager::is_live(SequenceId id) const {
  return id.value > 0 && id.index() < sequences_.size() && sequences_[id.index()].id == id;
}

const KVCacheManager::Sequence& KVCacheManager::get(SequenceId id) const {
  QUIRE_CHECK_ARG(is_live(id), "KVCacheManager: seq: ", kNotLive);
  return sequences_[id.index()];
}

KVCacheManager::Sequence& KVCacheManager::get(SequenceId id) {
  return const_cast<Sequence&>(std::as_const(*this).get(id));
}

// The sequences of a call, in visited_; each at most once.
void KVCacheManager::visit(const char* function, std::span<const SequenceId> seqs) {
  visited_.resize(seqs.size());
  ++num_visits_;
  for (size_t i = 0; i < seqs.size(); ++i) {
    QUIRE_CHECK_ARG(is_live(seqs[i]), function, ": seqs[", i, "]: ", kNotLive);
    Sequence& seq = sequence_of(seqs[i]);
    QUIRE_CHECK_ARG(seq.visit != num_visits_, function, ": seqs[", i,
                    "]: expected each sequence once, got one twice");
    seq.visit = num_visits_;
    visited_[i] = &seq;
  }
}

// Room for `count` more, so that references to sequences stay valid while they are added.
void KVCacheManager::reserve_sequences(size_t count) {
  const size_t size = sequences_.size() + count;
  QUIRE_CHECK_ARG(size <= kMaxSequences, "create: expected at most ", kMaxSequences,
                  " sequences at once");
  if (size > sequences_.capacity()) sequences_.reserve(std::max(size, 2 * sequences_.capacity()));
  unused_sequences_.reserve(sequences_.capacity());  // free() must not throw
  while (unused_sequences_.size() < count) {
    unused_sequences_.insert(unused_sequences_.begin(), static_cast<int32_t>(sequences_.size()));
    sequences_.emplace_back().table = BlockTable(block_size_);
  }
}

// The one that add_sequence() takes when `ahead` others have been taken. It may still have tokens
// and blocks of one that could not begin.
KVCacheManager::Sequence& KVCacheManager::unused_sequence(size_t ahead) {
  return sequences_[unused_sequences_.end()[-1 - static_cast<int64_t>(ahead)]];
}

// The first of `count` new serials.
int64_t KVCacheManager::take_serials(int64_t count) {
  return last_serial.fetch_add(count, std::memory_order_relaxed) + 1;
}

KVCacheManager::Sequence& KVCacheManager::add_sequence(int64_t serial) {
  const int32_t index = unused_sequences_.back();
  unused_sequences_.pop_back();
  sequences_[index].id = {serial << SequenceId::kIndexBits | index};
  return sequences_[index];
}

// Makes an entry without blocks unused. It keeps some memory for the next sequence.
void KVCacheManager::remove_sequence(Sequence& seq) {
  unused_sequences_.push_back(static_cast<int32_t>(&seq - sequences_.data()));
  std::vector<int32_t> tokens = std::move(seq.tokens);
  BlockTable table = std::move(seq.table);
  tokens.clear();
  table.clear();
  seq = Sequence{};
  if (tokens.capacity() <= kKeptCapacity) seq.tokens = std::move(tokens);
  seq.table = std::move(table);
}

int32_t KVCacheManager::num_sequences() const {
  const std::lock_guard guard(mutex_);
  return static_cast<int32_t>(sequences_.size() - unused_sequences_.size());
}

std::vector<SequenceId> KVCacheManager::sequences() const {
  const std::lock_guard guard(mutex_);
  std::vector<SequenceId> ids;
  for (const Sequence& seq : sequences_)
    if (seq.id != SequenceId{}) ids.push_back(seq.id);
  return ids;
}

// ---- What sequences know

int64_t KVCacheManager::num_computed(const Sequence& seq) const {
  return seq.row < 0 ? seq.num_computed : batch_.positions()[seq.row] + !loop_stepped_;
}

int64_t KVCacheManager::num_tokens(SequenceId id) const {
  const std::lock_guard guard(mutex_);
  const Sequence& seq = get(id);
  return seq.row < 0 ? seq.num_tokens() : num_computed(seq) + 1;
}

int64_t KVCacheManager::num_computed_tokens(SequenceId id) const {
  const std::lock_guard guard(mutex_);
  return num_computed(get(id));
}

int64_t KVCacheManager::num_cached_tokens(SequenceId id) const {
  const std::lock_guard guard(mutex_);
  return get(id).num_cached;
}

std::vector<int32_t> KVCacheManager::tokens(SequenceId id) const {
  const std::lock_guard guard(mutex_);
  settle();
  const Sequence& seq = get(id);
  std::vector<int32_t> result;
  if (seq.trunk) result = seq.trunk->tokens;
  result.insert(result.end(), seq.tokens.begin(), seq.tokens.end());
  return result;
}

std::span<const int32_t> KVCacheManager::pending_tokens(SequenceId id) const {
  const std::lock_guard guard(mutex_);
  settle();
  const Sequence& seq = get(id);
  return {seq.tokens_from(seq.num_computed),
          static_cast<size_t>(seq.num_tokens() - seq.num_computed)};
}

// ---- Beginning

SequenceId KVCacheManager::create(std::span<const int32_t> token_ids, Salt salt,
                                  Retention retention) {
  const std::lock_guard guard(mutex_);
  const SequenceId id = open(token_ids, salt, retention);
  try {
    attach(id);
  } catch (const std::bad_alloc&) {
    close(id);
    throw;
  }
  return id;
}

// Undoes open(), without memory.
void KVCacheManager::close(SequenceId id) {
  Sequence& seq = get(id);
  if (cache_) cache_->close_root(seq.root);
  remove_sequence(seq);
}

SequenceId KVCacheManager::open(std::span<const int32_t> token_ids, Salt salt,
                                Retention retention) {
  const std::lock_guard guard(mutex_);
  QUIRE_CHECK_ARG(!token_ids.empty(), "create: token_ids: expected 1 token or more, got none");
  QUIRE_CHECK_ARG(token_ids.size() <= INT32_MAX, "create: token_ids: expected less than 2^31, got ",
                  token_ids.size());
  check_retention(retention);
  reserve_sequences(1);
  Sequence& seq = unused_sequence(0);
  seq.tokens.reserve(token_ids.size() + kSpareCapacity);
  seq.tokens.assign(token_ids.begin(), token_ids.end());
  seq.table.clear();
  seq.table.reserve(static_cast<int64_t>(token_ids.size() + kSpareCapacity));
  seq.groups.assign(num_groups() - 1, {BlockTable(block_size_)});
  if (std::isfinite(retention.ttl) && !timers_) timers_.emplace(allocator_.num_blocks());
  if (cache_) seq.root = cache_->open_root(salt);
  add_sequence(take_serials(1));
  seq.retention = retention;
  const Retention usual;
  has_retention_ |= retention.priority != usual.priority || retention.ttl != usual.ttl;
  return seq.id;
}

void KVCacheManager::attach(SequenceId id) {
  const std::lock_guard guard(mutex_);
  Sequence& seq = get(id);
  check_here("attach", seq);
  QUIRE_CHECK_ARG(seq.table.size() == 0, "attach: seq: expected one without blocks, got ",
                  seq.table.size(), " blocks");
  take_path(seq, find_path(seq.root, std::span(seq.tokens).first(seq.tokens.size() - 1)));
}

// attach() of a sequence, of one group of layers, of which the latest call was match().
void KVCacheManager::attach_matched(SequenceId id, int64_t num_matched) {
  take_path(get(id), num_matched);
}

// Asks for the memory that a path of so many tokens takes, here and in a sequence.
void KVCacheManager::reserve_path(Sequence& seq, int64_t num_tokens) {
  const int32_t num_blocks = block_size_.blocks_for(num_tokens);
  path_.reserve(static_cast<size_t>(num_blocks) + 1);
  seq.table.reserve_more(num_blocks);
  for (GroupTable& group : seq.groups) group.table.reserve_more(num_blocks);
}

// Gives a sequence what it has in path_, whose length is num_cached tokens.
void KVCacheManager::take_path(Sequence& seq, int64_t num_cached) {
  reserve_path(seq, num_cached);
  seq.table.append(path_);
  for (int32_t block : path_) {
    allocator_.share(block);
    on_hit(block);
  }
  seq.num_cached = num_cached;
  seq.num_computed = seq.num_cached;
  if (companions_) attach_groups(seq);
  if (cache_ && !seq.was_attached) {  // a sequence that comes back is not a query of its own
    prefix_query_tokens_ += seq.num_tokens();
    prefix_hit_tokens_ += seq.num_cached;
  }
  seq.was_attached = true;
}

void KVCacheManager::detach(SequenceId id) {
  const std::lock_guard guard(mutex_);
  Sequence& seq = get(id);
  if (seq.away == Away::kSwapped) return drop_slots(seq);
  check_here("detach", seq);
  settle();
  reserve_more(seq.tokens, static_cast<size_t>(seq.num_trunk_tokens()));
  reserve_releases(num_held(seq));
  give_back(seq);
  seq.num_computed = seq.num_planned = 0;
}

// ---- Pins

int64_t KVCacheManager::pin(int32_t root, std::span<const int32_t> tokens) {
  const int64_t num_whole = find_path(root, tokens) / block_size_;
  path_.resize(static_cast<size_t>(num_whole));
  if (companions_) add_companions_to_path();
  try {
    for (int32_t block : path_) pins_.try_emplace(block, 0);
  } catch (const std::bad_alloc&) {
    for (int32_t block : path_)
      if (const auto pin = pins_.find(block); pin != pins_.end() && pin->second == 0)
        pins_.erase(pin);
    throw;
  }
  for (int32_t block : path_)
    if (pins_[block]++ == 0) allocator_.share(block);
  return num_whole * block_size_;
}

int64_t KVCacheManager::unpin(int32_t root, std::span<const int32_t> tokens) {
  path_.resize(static_cast<size_t>(find_path(root, tokens) / block_size_));
  std::unordered_map<int32_t, int64_t> num_ending;  // pins that reach a block and no child of it
  for (const auto& [block, count] : pins_) {
    num_ending[block] += count;
    if (const int32_t parent = cache_->parent(block); parent >= 0) num_ending[parent] -= count;
  }
  while (!path_.empty() && num_ending[path_.back()] <= 0) path_.pop_back();
  const int64_t num_whole = static_cast<int64_t>(path_.size());
  if (companions_) add_companions_to_path();
  std::reverse(path_.begin() + num_whole, path_.end());  // companions in order, before the tree:
  for (; !path_.empty(); path_.pop_back()) {  // the last first, so that leaves are evicted first
    const auto pin = pins_.find(path_.back());
    if (pin == pins_.end() || --pin->second > 0) continue;
    pins_.erase(pin);
    release_now(path_.back());
  }
  return num_whole * block_size_;
}

int64_t KVCacheManager::pin(std::span<const int32_t> token_ids, Salt salt) {
  const std::lock_guard guard(mutex_);
  return cache_ ? pin(cache_->find_root(salt), token_ids) : 0;
}

int64_t KVCacheManager::unpin(std::span<const int32_t> token_ids, Salt salt) {
  const std::lock_guard guard(mutex_);
  return cache_ ? unpin(cache_->find_root(salt), token_ids) : 0;
}

int64_t KVCacheManager::pin(SequenceId id) {
  const std::lock_guard guard(mutex_);
  const std::vector<int32_t> known = tokens(id);
  return pin(get(id).root, std::span(known).first(num_computed_tokens(id)));
}

int64_t KVCacheManager::unpin(SequenceId id) {
  const std::lock_guard guard(mutex_);
  const std::vector<int32_t> known = tokens(id);
  return unpin(get(id).root, std::span(known).first(num_computed_tokens(id)));
}

}  // namespace quire
