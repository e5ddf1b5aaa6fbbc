// SPDX-License-Identifier: Apache-2.0
// The C interface of KVCacheManager.
#include <vector>

#include "c_api/handles.h"

namespace quire::c {
namespace {

// A handle is one number on both sides.
std::span<const SequenceId> as_ids(const char* argument, const QuireSequenceId* seqs,
                                   size_t num_seqs) {
  static_assert(sizeof(SequenceId) == sizeof(QuireSequenceId));
  const auto given = as_span(argument, seqs, num_seqs);
  return {reinterpret_cast<const SequenceId*>(given.data()), given.size()};
}

QuireKVCacheStats as_c(const KVCacheStats& stats) {
  return {sizeof(QuireKVCacheStats), stats.num_blocks,          stats.block_size,
          stats.free_blocks,         stats.used_blocks,         stats.cached_blocks,
          stats.high_water_blocks,   stats.deferred_refs,       stats.used_tokens,
          stats.waste_tokens,        stats.prefix_query_tokens, stats.prefix_hit_tokens,
          stats.evicted_blocks,      stats.pinned_blocks,       stats.fenced_blocks,
          stats.lost_events,         stats.host_hit_tokens,     stats.file_hit_tokens,
          stats.num_host_blocks,     stats.swapped_blocks};
}

// How many tokens `sampled` holds; negative counts are the manager's to refuse.
size_t count_sampled(const int32_t* num_sampled, size_t num_seqs) {
  if (!num_sampled) return num_seqs;
  size_t total = 0;
  for (size_t i = 0; i < num_seqs; ++i) total += std::max(num_sampled[i], 0);
  return total;
}

static_assert(QUIRE_LRU == static_cast<int>(Eviction::kLru) &&
              QUIRE_REUSE_LRU == static_cast<int>(Eviction::kReuseLru));
static_assert(QUIRE_FULL == static_cast<int>(LayerGroup::Kind::kFull) &&
              QUIRE_SLIDING_WINDOW == static_cast<int>(LayerGroup::Kind::kSlidingWindow) &&
              QUIRE_CHUNKED_LOCAL == static_cast<int>(LayerGroup::Kind::kChunkedLocal) &&
              QUIRE_STATE == static_cast<int>(LayerGroup::Kind::kState));

KVCacheOptions options_of(const QuireKVCacheConfig& config) {
  const std::string name = "quire_kv_cache_manager_new: config";
  QUIRE_CHECK_ARG(config.eviction >= QUIRE_LRU && config.eviction <= QUIRE_REUSE_LRU, name,
                  ".eviction: expected a QuireEviction, got ", config.eviction);
  QUIRE_CHECK_ARG(config.num_groups >= 0, name, ".num_groups: expected 0 or more, got ",
                  config.num_groups);
  KVCacheOptions options;
  options.eviction = static_cast<Eviction>(config.eviction);
  options.event_capacity = config.event_capacity;
  options.num_host_blocks = config.num_host_blocks;
  for (const QuireLayerGroup& group :
       as_span((name + ".groups").c_str(), config.groups, config.num_groups)) {
    QUIRE_CHECK_ARG(group.kind >= QUIRE_FULL && group.kind <= QUIRE_STATE, name, ".groups[",
                    options.groups.size(), "].kind: expected a QuireLayerGroupKind, got ",
                    group.kind);
    options.groups.push_back({static_cast<LayerGroup::Kind>(group.kind), group.size});
  }
  return options;
}

}  // namespace

Prompt as_prompt(const char* argument, const QuirePrompt* prompt) {
  const auto given = read_struct<QuirePrompt>(argument, prompt, QUIRE_PROMPT_INIT);
  Prompt result{as_span(argument, given.token_ids, given.num_tokens), {}, {}};
  result.retention.priority = given.priority;
  if (given.ttl >= 0) result.retention.ttl = given.ttl;
  if (given.salt) result.salt.emplace(given.salt, given.salt_size);
  return result;
}

QuireStepBatch as_c(const StepBatch& batch) noexcept {
  QuireStepBatch c = QUIRE_STEP_BATCH_INIT;
  c.ticket = batch.ticket();
  c.batch_size = batch.batch_size();
  c.max_blocks = batch.max_blocks();
  c.block_table_stride = batch.block_table_stride();
  c.block_table = batch.block_table().data();
  c.seq_lens = batch.seq_lens().data();
  c.cu_seqlens_q = batch.cu_seqlens_q().data();
  // A state group has none.
  if (batch.slot_mapping().size() == batch.positions().size())
    c.slot_mapping = batch.slot_mapping().data();
  c.positions = batch.positions().data();
  c.copies = batch.copies().data();
  c.total_q = static_cast<int64_t>(batch.positions().size());
  c.num_copies = static_cast<int64_t>(batch.copies().size() / 2);
  c.changes = batch.changes().data();
  c.num_changes = static_cast<int64_t>(batch.changes().size() / 2);
  return c;
}

}  // namespace quire::c

using namespace quire::c;

QuireStatus quire_kv_cache_manager_new(const QuireKVCacheConfig* config,
                                       QuireKVCacheManager** manager) {
  return guard([&] {
    QuireKVCacheManager*& out = deref("quire_kv_cache_manager_new: manager", manager);
    const auto given = read_struct<QuireKVCacheConfig>("quire_kv_cache_manager_new: config", config,
                                                       QUIRE_KV_CACHE_CONFIG_INIT);
    out = new QuireKVCacheManager{{given.num_blocks, given.block_size, given.prefix_caching != 0,
                                   given.async_depth, options_of(given)}};
  });
}

void quire_kv_cache_manager_delete(QuireKVCacheManager* manager) { delete manager; }

QuireStatus quire_kv_cache_manager_create(QuireKVCacheManager* manager, const QuirePrompt* prompt,
                                          QuireSequenceId* seq) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_create: manager", manager).manager;
    QuireSequenceId& out = deref("quire_kv_cache_manager_create: seq", seq);
    const Prompt given = as_prompt("quire_kv_cache_manager_create: prompt", prompt);
    const quire::SequenceId id = self.create(given.tokens, given.salt, given.retention);
    out = {id.value};
  });
}

QuireStatus quire_kv_cache_manager_free(QuireKVCacheManager* manager, const QuireSequenceId* seqs,
                                        size_t num_seqs) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_free: manager", manager);
    self.manager.free(as_ids("quire_kv_cache_manager_free: seqs", seqs, num_seqs));
  });
}

QuireStatus quire_kv_cache_manager_step(QuireKVCacheManager* manager, const QuireSequenceId* seqs,
                                        const int32_t* num_new_tokens, size_t num_seqs,
                                        QuireStepBatch* batch) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_step: manager", manager).manager;
    const auto given = read_struct<QuireStepBatch>("quire_kv_cache_manager_step: batch", batch,
                                                   QUIRE_STEP_BATCH_INIT);
    const auto ids = as_ids("quire_kv_cache_manager_step: seqs", seqs, num_seqs);
    const auto counts =
        as_span("quire_kv_cache_manager_step: num_new_tokens", num_new_tokens, num_seqs);
    const auto lock = self.lock();
    const quire::StepBatch* step = self.step(ids, counts, given.lookahead);
    if (!step) return QUIRE_OUT_OF_BLOCKS;
    QuireStepBatch result = as_c(*step);
    result.lookahead = given.lookahead;
    write_struct(result, batch);
    return QUIRE_OK;
  });
}

QuireStatus quire_kv_cache_manager_commit(QuireKVCacheManager* manager, const QuireSequenceId* seqs,
                                          size_t num_seqs, const int32_t* sampled,
                                          const int32_t* num_sampled) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_commit: manager", manager);
    const auto ids = as_ids("quire_kv_cache_manager_commit: seqs", seqs, num_seqs);
    if (!sampled && !num_sampled) return self.manager.commit(ids);
    const auto tokens = as_span("quire_kv_cache_manager_commit: sampled", sampled,
                                count_sampled(num_sampled, num_seqs));
    self.manager.commit(ids, tokens, {num_sampled, num_sampled ? num_seqs : 0});
  });
}

QuireStatus quire_kv_cache_manager_fork(QuireKVCacheManager* manager, QuireSequenceId seq,
                                        QuireSequenceId* child) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_fork: manager", manager).manager;
    QuireSequenceId& out = deref("quire_kv_cache_manager_fork: child", child);
    out = {self.fork(as_id(seq)).value};
  });
}

QuireStatus quire_kv_cache_manager_fork_many(QuireKVCacheManager* manager, QuireSequenceId seq,
                                             QuireSequenceId* children, size_t num_children) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_fork_many: manager", manager).manager;
    const auto out = as_span("quire_kv_cache_manager_fork_many: children", children, num_children);
    std::vector<quire::SequenceId> ids(num_children);
    self.fork(as_id(seq), ids);
    std::transform(ids.begin(), ids.end(), out.begin(),
                   [](quire::SequenceId id) { return QuireSequenceId{id.value}; });
  });
}

QuireStatus quire_kv_cache_manager_pin_sequence(QuireKVCacheManager* manager, QuireSequenceId seq,
                                                int64_t* num_tokens) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_pin_sequence: manager", manager).manager;
    int64_t& out = deref("quire_kv_cache_manager_pin_sequence: num_tokens", num_tokens);
    out = self.pin(as_id(seq));
  });
}

QuireStatus quire_kv_cache_manager_unpin_sequence(QuireKVCacheManager* manager, QuireSequenceId seq,
                                                  int64_t* num_tokens) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_unpin_sequence: manager", manager).manager;
    int64_t& out = deref("quire_kv_cache_manager_unpin_sequence: num_tokens", num_tokens);
    out = self.unpin(as_id(seq));
  });
}

QuireStatus quire_kv_cache_manager_token_ids(const QuireKVCacheManager* manager,
                                             QuireSequenceId seq, int32_t* buffer, size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_token_ids: manager", manager).manager;
    const std::vector<int32_t> ids = self.tokens(as_id(seq));
    write_array<int32_t>("quire_kv_cache_manager_token_ids: size", ids, buffer, size);
  });
}

QuireStatus quire_kv_cache_manager_truncate(QuireKVCacheManager* manager, QuireSequenceId seq,
                                            int64_t num_tokens) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_truncate: manager", manager).manager;
    self.truncate(as_id(seq), num_tokens);
  });
}

QuireStatus quire_kv_cache_manager_retire(QuireKVCacheManager* manager, int64_t ticket) {
  return guard(
      [&] { deref("quire_kv_cache_manager_retire: manager", manager).manager.retire(ticket); });
}

QuireStatus quire_kv_cache_manager_match(const QuireKVCacheManager* manager,
                                         const QuirePrompt* prompt, int64_t* num_tokens) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_match: manager", manager).manager;
    int64_t& out = deref("quire_kv_cache_manager_match: num_tokens", num_tokens);
    const Prompt given = as_prompt("quire_kv_cache_manager_match: prompt", prompt);
    out = self.match(given.tokens, given.salt).num_tokens;
  });
}

QuireStatus quire_kv_cache_manager_pin(QuireKVCacheManager* manager, const QuirePrompt* prompt,
                                       int64_t* num_tokens) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_pin: manager", manager).manager;
    int64_t& out = deref("quire_kv_cache_manager_pin: num_tokens", num_tokens);
    const Prompt given = as_prompt("quire_kv_cache_manager_pin: prompt", prompt);
    out = self.pin(given.tokens, given.salt);
  });
}

QuireStatus quire_kv_cache_manager_unpin(QuireKVCacheManager* manager, const QuirePrompt* prompt,
                                         int64_t* num_tokens) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_unpin: manager", manager).manager;
    int64_t& out = deref("quire_kv_cache_manager_unpin: num_tokens", num_tokens);
    const Prompt given = as_prompt("quire_kv_cache_manager_unpin: prompt", prompt);
    out = self.unpin(given.tokens, given.salt);
  });
}

QuireStatus quire_kv_cache_manager_sequence(const QuireKVCacheManager* manager, QuireSequenceId seq,
                                            QuireSequenceInfo* info) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_sequence: manager", manager).manager;
    check_struct_size("quire_kv_cache_manager_sequence: info", info);
    const quire::SequenceId id = as_id(seq);
    write_struct<QuireSequenceInfo>({sizeof(QuireSequenceInfo), self.num_tokens(id),
                                     self.num_computed_tokens(id), self.num_cached_tokens(id)},
                                    info);
  });
}

QuireStatus quire_kv_cache_manager_block_table(const QuireKVCacheManager* manager,
                                               QuireSequenceId seq, int32_t* buffer, size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_block_table: manager", manager).manager;
    const std::vector<int32_t> ids = self.block_table(as_id(seq));
    write_array<int32_t>("quire_kv_cache_manager_block_table: size", ids, buffer, size);
  });
}

QuireStatus quire_kv_cache_manager_stats(const QuireKVCacheManager* manager,
                                         QuireKVCacheStats* stats) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_stats: manager", manager).manager;
    check_struct_size("quire_kv_cache_manager_stats: stats", stats);
    write_struct(as_c(self.stats()), stats);
  });
}

QuireStatus quire_kv_cache_manager_validate(const QuireKVCacheManager* manager) {
  return guard(
      [&] { deref("quire_kv_cache_manager_validate: manager", manager).manager.validate(); });
}
