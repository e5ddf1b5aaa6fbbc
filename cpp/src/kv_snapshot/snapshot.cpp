// SPDX-License-Identifier: Apache-2.0
// The whole state of a manager as lists of numbers, and back.
#include "kv_snapshot/snapshot.h"

#include <algorithm>
#include <bit>
#include <map>
#include <memory>
#include <utility>

#include "quire/error.h"

namespace quire {

using snapshot::Numbers;
using snapshot::put_list;
using snapshot::Reader;

namespace {

constexpr int64_t kVersion = 2;
constexpr auto kLastKind = static_cast<int64_t>(LayerGroup::Kind::kState);

int32_t num_blocks_of(const snapshot::Object& object) {
  Reader reader(object, "manager");
  if (reader.next() != kVersion) reader.refuse(concat("version ", kVersion));
  return reader.next_int32(1, static_cast<int64_t>(Reader(object, "allocator").rest().size()));
}

KVCacheOptions options_of(const snapshot::Object& object) {
  Reader reader(object, "options");
  KVCacheOptions options;
  options.eviction = static_cast<Eviction>(reader.next(0, 1));
  options.event_capacity = reader.next_int32(0);
  const auto host = object.find("host");
  options.num_host_blocks =
      reader.next_int32(0, host == object.end() ? 0 : static_cast<int64_t>(host->second.size()));
  for (Reader groups(object, "groups"); !groups.is_at_end();) {
    const auto kind = static_cast<LayerGroup::Kind>(groups.next(0, kLastKind));
    options.groups.push_back({kind, groups.next_int32(0)});
  }
  return options;
}

// The first list names what the constructor takes: version, blocks, their size, caching, depth.
struct Shape {
  int32_t num_blocks, block_size, async_depth;
  bool prefix_caching;

  explicit Shape(const snapshot::Object& object) : num_blocks(num_blocks_of(object)) {
    Reader reader(object, "manager");
    reader.next();
    reader.next();
    block_size = reader.next_int32(1);
    prefix_caching = reader.next(0, 1) != 0;
    async_depth = reader.next_int32(0);
  }
};

}  // namespace

// ---- Saving

std::string KVCacheManager::snapshot() const {
  const std::lock_guard guard(mutex_);
  QUIRE_CHECK_ARG(fetches_.empty(), "snapshot: expected no fetch under way, got ", fetches_.size());
  settle();
  Snapshot out;
  const int32_t capacity = events_ ? events_->capacity() : 0;
  out["manager"] = {kVersion, allocator_.num_blocks(), block_size_, cache_.has_value(),
                    async_depth_};
  out["options"] = {allocator_.reuse() != nullptr, capacity, host_ ? host_->num_blocks() : 0};
  out["counts"] = {last_ticket_,    last_retired_,      prefix_query_tokens_, prefix_hit_tokens_,
                   evicted_blocks_, fetched_tokens_[1], fetched_tokens_[2]};
  out["allocator"] = allocator_.save();
  if (allocator_.reuse()) out["reuse"] = allocator_.reuse()->save();
  if (cache_) out["tree"] = cache_->save();
  if (host_) out["host"] = host_->save();
  out["groups"];
  for (int32_t group = 0; companions_ && group < num_groups(); ++group)
    for (int64_t number : {int64_t{static_cast<int>(companions_->group(group).kind)},
                           int64_t{companions_->group(group).size}})
      out["groups"].push_back(number);
  for (int32_t group = 0; group < num_groups(); ++group) {
    out["batch"].push_back(batch(group).num_rows_reserved());
    out["batch"].push_back(batch(group).block_table_stride());
  }
  save_companions(out);
  save_sequences(out);
  save_retention(out);
  return snapshot::to_json(out);
}

void KVCacheManager::save_sequences(Snapshot& out) const {
  std::unordered_map<const Trunk*, int64_t> trunks;
  Numbers trunk_lists, list;
  for (const Sequence& seq : sequences_) {
    list.push_back(seq.id.value);
    if (seq.id == SequenceId{}) continue;
    int64_t trunk = -1;
    if (seq.trunk) {
      const auto [entry, is_new] = trunks.emplace(seq.trunk, trunks.size());
      trunk = entry->second;
      if (is_new) put_list(trunk_lists, seq.trunk->blocks);
      if (is_new) put_list(trunk_lists, seq.trunk->tokens);
    }
    const Numbers fields = {seq.root,
                            seq.was_attached,
                            seq.retention.priority,
                            std::bit_cast<int64_t>(seq.retention.ttl),
                            seq.num_computed,
                            seq.num_planned,
                            seq.num_cached,
                            trunk};
    list.insert(list.end(), fields.begin(), fields.end());
    put_list(list, seq.tokens);
    put_list(list, seq.table.own_from(seq.table.num_shared()));
    for (const GroupTable& group : seq.groups) {
      list.push_back(group.num_behind);
      put_list(list, group.table.ids());
    }
  }
  out["sequences"] = std::move(list);
  out["trunks"] = std::move(trunk_lists);
  out["unused_sequences"].assign(unused_sequences_.begin(), unused_sequences_.end());
  for (SequenceId id : loop_seqs_) out["loop"].push_back(id.value);
  out["loop"];
  Numbers& swaps = out["swapped"];
  for (const auto& [index, swapped] : std::map(swapped_.begin(), swapped_.end())) {
    swaps.push_back(index);
    swaps.push_back(swapped.num_computed);
    put_list(swaps, swapped.slots);
  }
}

void KVCacheManager::save_companions(Snapshot& out) const {
  Numbers& list = out["companions"];
  for (int32_t block = 0; companions_ && block < allocator_.num_blocks(); ++block)
    if (companions_->contains(block))
      list.insert(list.end(), {companions_->group_of(block), companions_->node_of(block), block});
}

// ---- Restoring

KVCacheManager KVCacheManager::restore(std::string_view json) {
  Snapshot snapshot;
  static_cast<snapshot::Object&>(snapshot) = snapshot::from_json(json);
  return KVCacheManager(snapshot);
}

KVCacheManager::KVCacheManager(const Snapshot& in) try
    : KVCacheManager(num_blocks_of(in), Shape(in).block_size, Shape(in).prefix_caching,
                     Shape(in).async_depth, options_of(in)) {
  Reader counts(in, "counts");
  last_ticket_ = counts.next(0);
  last_retired_ = counts.next(0, last_ticket_);
  for (int64_t* count : {&prefix_query_tokens_, &prefix_hit_tokens_, &evicted_blocks_,
                         &fetched_tokens_[1], &fetched_tokens_[2]})
    *count = counts.next(0);
  allocator_.load(Reader(in, "allocator").rest());
  if (allocator_.reuse()) allocator_.reuse()->load(Reader(in, "reuse").rest());
  if (cache_) cache_->load(Reader(in, "tree").rest());
  load_companions(in);
  if (host_) host_->load(Reader(in, "host").rest());
  load_sequences(in);
  load_retention(in);
  load_batches(in);
  validate();
  for (int32_t block : cache_&& events_ ? cache_->parents_first() : std::vector<int32_t>{})
    push_event(CacheEventKind::kStored, block);
} catch (const InvariantError& error) {
  throw InvalidArgument(concat("restore: snapshot: expected a consistent one; ", error.what()));
}

void KVCacheManager::load_companions(const Snapshot& in) {
  const int32_t last_block = allocator_.num_blocks() - 1;
  for (Reader reader(in, "companions"); !reader.is_at_end();) {
    const int32_t group = reader.next_int32(1, num_groups() - 1);
    const int32_t node = reader.next_int32(0, last_block);
    const int32_t block = reader.next_int32(0, last_block);
    if (companions_->contains(block) || companions_->find(group, node) != CompanionCache::kNone)
      reader.refuse("each companion once");
    companions_->insert(group, node, block);
  }
}

// Room for as many rows as there was, so that the tables go on in the same shape.
void KVCacheManager::load_batches(const Snapshot& in) {
  Reader reader(in, "batch");
  for (int32_t group = 0; group < num_groups(); ++group) {
    StepBatch& batch = group == 0 ? batch_ : group_batches_[group - 1];
    StepBatch::Size size;
    size.batch_size = reader.next_int32(0);
    size.max_blocks = reader.next_int32(0, allocator_.num_blocks() * 2LL);
    if (!batch.may_hold(size)) reader.refuse("a block table of less than 2^31 entries");
    batch.begin(last_ticket_, size);
    batch.begin(last_ticket_, {});
  }
}

void KVCacheManager::load_sequences(const Snapshot& in) {
  std::vector<std::unique_ptr<Trunk>> trunks = load_trunks(in);
  std::vector<int64_t> trunk_of;  // by sequence; -1: none
  int64_t last_serial = 0;
  for (Reader reader(in, "sequences"); !reader.is_at_end();) {
    Sequence& seq = sequences_.emplace_back();
    seq.table = BlockTable(block_size_);
    trunk_of.push_back(-1);
    seq.id = {reader.next(0, INT64_MAX / 2)};  // serial numbers go on behind it
    if (seq.id == SequenceId{}) continue;
    if (seq.id.index() != sequences_.size() - 1) reader.refuse("an id of its own place");
    last_serial = std::max(last_serial, seq.id.value >> SequenceId::kIndexBits);
    trunk_of.back() = load_sequence(seq, reader, trunks);
    if (cache_) cache_->hold_root(seq.root);
  }
  load_unused(in);
  load_swapped(in);
  for (Reader loop(in, "loop"); !loop.is_at_end();) {
    loop_seqs_.push_back({loop.next()});
    if (!is_live(loop_seqs_.back())) loop.refuse("sequences");
  }
  for (int64_t trunk : trunk_of)
    if (trunk >= 0) ++trunks[trunk]->num_holders;
  for (const auto& trunk : trunks)
    if (trunk->num_holders == 0) Reader(in, "trunks").refuse("holders of each");
  for (size_t i = 0; i < trunk_of.size(); ++i)
    if (trunk_of[i] >= 0) sequences_[i].trunk = trunks[trunk_of[i]].get();
  for (auto& trunk : trunks) trunk.release();  // its holders' from now on
  reserve_serials(last_serial);
}

std::vector<std::unique_ptr<KVCacheManager::Trunk>> KVCacheManager::load_trunks(
    const Snapshot& in) const {
  std::vector<std::unique_ptr<Trunk>> trunks;
  for (Reader reader(in, "trunks"); !reader.is_at_end();) {
    trunks.push_back(std::make_unique<Trunk>());
    trunks.back()->blocks = reader.next_list(0, allocator_.num_blocks() - 1);
    trunks.back()->tokens = reader.next_list();
    if (trunks.back()->tokens.size() != trunks.back()->blocks.size() * block_size_)
      reader.refuse("whole blocks");
  }
  return trunks;
}

// All but its id and its hold on a trunk, whose number is returned.
int64_t KVCacheManager::load_sequence(Sequence& seq, Reader& reader,
                                      const std::vector<std::unique_ptr<Trunk>>& trunks) {
  seq.root = reader.next_int32(INT32_MIN, 0);
  if (cache_ && !cache_->is_open(seq.root)) reader.refuse("an open root");
  seq.was_attached = reader.next(0, 1) != 0;
  seq.retention.priority = reader.next_int32(0, Retention::kMaxPriority);
  seq.retention.ttl = std::bit_cast<double>(reader.next());
  if (!(seq.retention.ttl >= 0)) reader.refuse("a ttl of 0 or more");
  seq.num_computed = reader.next(0, INT32_MAX);
  seq.num_planned = reader.next(0, INT32_MAX);
  seq.num_cached = reader.next(0, INT32_MAX);
  const int64_t trunk = reader.next(-1, static_cast<int64_t>(trunks.size()) - 1);
  seq.tokens = reader.next_list();
  const int64_t num_shared = trunk < 0 ? 0 : static_cast<int64_t>(trunks[trunk]->tokens.size());
  if ((seq.tokens.empty() && num_shared == 0) || num_shared > seq.num_computed)
    reader.refuse("tokens, and those of the trunk computed");
  if (trunk >= 0) seq.table.share(trunks[trunk]->blocks);
  seq.table.append(reader.next_list(0, allocator_.num_blocks() - 1));
  seq.groups.assign(num_groups() - 1, {BlockTable(block_size_)});
  for (GroupTable& group : seq.groups) {
    group.num_behind = reader.next_int32(0, seq.table.size());
    group.table.append(reader.next_list(-1, allocator_.num_blocks() - 1));
    for (int32_t i = 0; i < group.table.size(); ++i)
      if ((group.table[i] < 0) != (i < group.num_behind)) reader.refuse("blocks behind num_behind");
  }
  return trunk;
}

void KVCacheManager::load_unused(const Snapshot& in) {
  Reader reader(in, "unused_sequences");
  std::vector<bool> is_unused(sequences_.size());
  unused_sequences_.reserve(sequences_.capacity());
  while (!reader.is_at_end()) {
    const int32_t index = reader.next_int32(0, static_cast<int64_t>(sequences_.size()) - 1);
    if (sequences_[index].id != SequenceId{} || is_unused[index])
      reader.refuse("entries without a sequence, each once");
    is_unused[index] = true;
    unused_sequences_.push_back(index);
  }
  if (sequences().size() != static_cast<size_t>(num_sequences()))
    reader.refuse("all entries without a sequence");
}

void KVCacheManager::load_swapped(const Snapshot& in) {
  for (Reader reader(in, "swapped"); !reader.is_at_end();) {
    const int32_t index = reader.next_int32(0, static_cast<int64_t>(sequences_.size()) - 1);
    if (!host_ || sequences_[index].id == SequenceId{} || swapped_.contains(index))
      reader.refuse("sequences that can be swapped out, each once");
    sequences_[index].away = Away::kSwapped;
    Swapped& swapped = swapped_[index];
    swapped.num_computed = reader.next(0, sequences_[index].num_tokens());
    swapped.slots = reader.next_list(0, host_->num_blocks() - 1);
  }
}

}  // namespace quire
