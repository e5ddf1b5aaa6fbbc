// SPDX-License-Identifier: Apache-2.0
// The C interface of KVCacheManager for who plans its steps: layer groups, sequences without
// blocks, what is missing, and the lock.
#include "c_api/handles.h"

using namespace quire::c;

QuireStatus quire_kv_cache_manager_groups(const QuireKVCacheManager* manager,
                                          QuireLayerGroup* buffer, size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_groups: manager", manager).manager;
    std::vector<QuireLayerGroup> groups;
    for (int32_t i = 0; i < self.num_groups(); ++i) {
      const quire::LayerGroup group = self.group(i);
      groups.push_back({static_cast<int32_t>(group.kind), group.size});
    }
    write_array<QuireLayerGroup>("quire_kv_cache_manager_groups: size", groups, buffer, size);
  });
}

QuireStatus quire_kv_cache_manager_group_stats(const QuireKVCacheManager* manager,
                                               QuireLayerGroupStats* buffer, size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_group_stats: manager", manager).manager;
    std::vector<QuireLayerGroupStats> groups;
    for (const quire::LayerGroupStats& stats : self.group_stats())
      groups.push_back({stats.used_blocks, stats.cached_blocks});
    write_array<QuireLayerGroupStats>("quire_kv_cache_manager_group_stats: size", groups, buffer,
                                      size);
  });
}

QuireStatus quire_kv_cache_manager_group_batch(const QuireKVCacheManager* manager, int32_t group,
                                               QuireStepBatch* batch) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_group_batch: manager", manager).manager;
    check_struct_size("quire_kv_cache_manager_group_batch: batch", batch);
    QUIRE_CHECK_ARG(group >= 0 && group < self.num_groups(),
                    "quire_kv_cache_manager_group_batch: group: expected 0 to ",
                    self.num_groups() - 1, ", got ", group);
    const auto lock = self.lock();
    write_struct(as_c(self.batch(group)), batch);
  });
}

QuireStatus quire_kv_cache_manager_group_block_table(const QuireKVCacheManager* manager,
                                                     QuireSequenceId seq, int32_t group,
                                                     int32_t* buffer, size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_group_block_table: manager", manager).manager;
    const std::vector<int32_t> ids = self.block_table(as_id(seq), group);
    write_array<int32_t>("quire_kv_cache_manager_group_block_table: size", ids, buffer, size);
  });
}

QuireStatus quire_kv_cache_manager_lock(QuireKVCacheManager* manager) {
  return guard([&] {
    QuireKVCacheManager& self = deref("quire_kv_cache_manager_lock: manager", manager);
    std::unique_lock lock = self.manager.lock();
    self.locks.push_back(std::move(lock));
  });
}

QuireStatus quire_kv_cache_manager_unlock(QuireKVCacheManager* manager) {
  return guard([&] {
    QuireKVCacheManager& self = deref("quire_kv_cache_manager_unlock: manager", manager);
    // While another thread holds the lock this waits; then there is nothing to give back.
    const auto lock = self.manager.lock();
    QUIRE_CHECK_ARG(!self.locks.empty(),
                    "quire_kv_cache_manager_unlock: manager: expected one that this thread has "
                    "locked, got one that it has not");
    self.locks.pop_back();
  });
}

QuireStatus quire_kv_cache_manager_info(const QuireKVCacheManager* manager,
                                        QuireKVCacheInfo* info) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_info: manager", manager).manager;
    check_struct_size("quire_kv_cache_manager_info: info", info);
    const auto lock = self.lock();
    write_struct<QuireKVCacheInfo>(
        {sizeof(QuireKVCacheInfo), self.num_bytes(), self.num_groups(), self.num_sequences(),
         self.prefix_caching(), self.caches_states()},
        info);
  });
}

QuireStatus quire_kv_cache_manager_may_step(const QuireKVCacheManager* manager, int32_t* may_step) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_may_step: manager", manager).manager;
    deref("quire_kv_cache_manager_may_step: may_step", may_step) = self.may_step();
  });
}

QuireStatus quire_kv_cache_manager_open(QuireKVCacheManager* manager, const QuirePrompt* prompt,
                                        QuireSequenceId* seq) {
  return guard([&] {
    auto& self = deref("quire_kv_cache_manager_open: manager", manager).manager;
    QuireSequenceId& out = deref("quire_kv_cache_manager_open: seq", seq);
    const Prompt given = as_prompt("quire_kv_cache_manager_open: prompt", prompt);
    out = {self.open(given.tokens, given.salt, given.retention).value};
  });
}

QuireStatus quire_kv_cache_manager_attach(QuireKVCacheManager* manager, QuireSequenceId seq) {
  return guard(
      [&] { deref("quire_kv_cache_manager_attach: manager", manager).manager.attach(as_id(seq)); });
}

QuireStatus quire_kv_cache_manager_detach(QuireKVCacheManager* manager, QuireSequenceId seq) {
  return guard(
      [&] { deref("quire_kv_cache_manager_detach: manager", manager).manager.detach(as_id(seq)); });
}

QuireStatus quire_kv_cache_manager_match_sequence(const QuireKVCacheManager* manager,
                                                  QuireSequenceId seq, QuirePrefixMatch* match) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_match_sequence: manager", manager).manager;
    check_struct_size("quire_kv_cache_manager_match_sequence: match", match);
    const quire::PrefixMatch found = self.match(as_id(seq));
    write_struct<QuirePrefixMatch>(
        {sizeof(QuirePrefixMatch), found.num_tokens, found.num_idle_blocks, found.num_blocks},
        match);
  });
}

QuireStatus quire_kv_cache_manager_sequences(const QuireKVCacheManager* manager,
                                             QuireSequenceId* buffer, size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_sequences: manager", manager).manager;
    std::vector<QuireSequenceId> ids;
    for (const quire::SequenceId id : self.sequences()) ids.push_back({id.value});
    write_array<QuireSequenceId>("quire_kv_cache_manager_sequences: size", ids, buffer, size);
  });
}

QuireStatus quire_kv_cache_manager_pending_tokens(const QuireKVCacheManager* manager,
                                                  QuireSequenceId seq, int32_t* buffer,
                                                  size_t* size) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_pending_tokens: manager", manager).manager;
    const auto lock = self.lock();
    write_array("quire_kv_cache_manager_pending_tokens: size", self.pending_tokens(as_id(seq)),
                buffer, size);
  });
}

QuireStatus quire_kv_cache_manager_shareable_tokens(const QuireKVCacheManager* manager,
                                                    QuireSequenceId a, QuireSequenceId b,
                                                    int64_t* num_tokens) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_shareable_tokens: manager", manager).manager;
    int64_t& out = deref("quire_kv_cache_manager_shareable_tokens: num_tokens", num_tokens);
    out = self.shareable_tokens(as_id(a), as_id(b));
  });
}

QuireStatus quire_kv_cache_manager_num_missing_blocks(const QuireKVCacheManager* manager,
                                                      QuireSequenceId seq, int64_t num_tokens,
                                                      int64_t max_step, int32_t* num_blocks) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_num_missing_blocks: manager", manager).manager;
    int32_t& out = deref("quire_kv_cache_manager_num_missing_blocks: num_blocks", num_blocks);
    out = self.num_missing_blocks(as_id(seq), num_tokens, max_step);
  });
}

QuireStatus quire_kv_cache_manager_num_blocks_for(const QuireKVCacheManager* manager,
                                                  int64_t num_tokens, int64_t max_step,
                                                  int64_t* num_blocks) {
  return guard([&] {
    const auto& self = deref("quire_kv_cache_manager_num_blocks_for: manager", manager).manager;
    int64_t& out = deref("quire_kv_cache_manager_num_blocks_for: num_blocks", num_blocks);
    out = self.num_blocks_for(num_tokens, max_step);
  });
}
