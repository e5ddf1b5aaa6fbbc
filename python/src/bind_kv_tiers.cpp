// SPDX-License-Identifier: Apache-2.0
// What a KVCacheManager says about its blocks: events, statistics, copies to other tiers,
// snapshots.
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "kv_cache.h"
#include "kv_store.h"
#include "named.h"
#include "quire/error.h"

namespace quire::python {
namespace {

const char* name_of(CacheEventKind kind) {
  static constexpr const char* kNames[] = {"stored", "removed", "evicted", "swapped"};
  return kNames[static_cast<int>(kind)];
}

nb::bytes bytes_of(const ChainKey& key) { return nb::bytes(key.bytes.data(), key.bytes.size()); }

nb::object stats(const PyManager& self) {
  const KVCacheStats stats = [&] {
    nb::gil_scoped_release unlocked;
    return self.manager.stats();
  }();
  nb::dict d;
  d["num_blocks"] = stats.num_blocks;
  d["block_size"] = stats.block_size;
  d["free_blocks"] = stats.free_blocks;
  d["used_blocks"] = stats.used_blocks;
  d["cached_blocks"] = stats.cached_blocks;
  d["high_water_blocks"] = stats.high_water_blocks;
  d["deferred_refs"] = stats.deferred_refs;
  d["used_tokens"] = stats.used_tokens;
  d["waste_tokens"] = stats.waste_tokens;
  d["prefix_query_tokens"] = stats.prefix_query_tokens;
  d["prefix_hit_tokens"] = stats.prefix_hit_tokens;
  d["host_hit_tokens"] = stats.host_hit_tokens;
  d["file_hit_tokens"] = stats.file_hit_tokens;
  d["evicted_blocks"] = stats.evicted_blocks;
  d["pinned_blocks"] = stats.pinned_blocks;
  d["fenced_blocks"] = stats.fenced_blocks;
  d["num_host_blocks"] = stats.num_host_blocks;
  d["swapped_blocks"] = stats.swapped_blocks;
  d["lost_events"] = stats.lost_events;
  d["num_bytes"] = self.manager.num_bytes();
  return nb::module_::import_("quire._stats").attr("KVCacheStats")(**d);
}

// [n, 2], or None.
nb::object pairs_of(std::optional<KVCacheManager::BlockPairs> pairs) {
  if (!pairs) return nb::none();
  auto* kept = new KVCacheManager::BlockPairs(std::move(*pairs));
  const nb::capsule owner(
      kept, [](void* p) noexcept { delete static_cast<KVCacheManager::BlockPairs*>(p); });
  const size_t shape[] = {kept->size(), 2};
  auto* data = reinterpret_cast<int32_t*>(kept->data());
  return nb::cast(nb::ndarray<nb::numpy, int32_t>(data, 2, shape, owner));
}

nb::object list_of(const std::optional<std::vector<KVTransfer>>& transfers) {
  if (!transfers) return nb::none();
  nb::list list;
  for (const KVTransfer& transfer : *transfers) list.append(transfer);
  return list;
}

void bind_values(nb::module_& m) {
  nb::class_<CacheEvent>(m, "CacheEvent",
                         "What happened to a cached block; see KVCacheManager.take_events().\n\n"
                         "Example::\n\n    event.kind, event.key.hex()")
      .def_ro("sequence", &CacheEvent::sequence, "1, 2, 3, ...; a gap: events were lost.")
      .def_prop_ro(
          "kind", [](const CacheEvent& e) { return name_of(e.kind); },
          "\"stored\" (can be found from now on), \"removed\" (given up by clear_cache()), "
          "\"evicted\"\n"
          "(given up for room) or \"swapped\" (so, too, and the store `tier` has been offered it "
          "or\n"
          "has it).")
      .def_prop_ro(
          "tier", [](const CacheEvent& e) { return tier_name(e.tier); },
          "\"device\", or of a swapped block \"host\" or \"file\".")
      .def_ro("block", &CacheEvent::block, "Its id in the pool.")
      .def_prop_ro(
          "key", [](const CacheEvent& e) { return bytes_of(e.key); },
          "The chain key, 32 bytes; of whole blocks as chain_keys() has it.")
      .def_prop_ro(
          "parent", [](const CacheEvent& e) { return bytes_of(e.parent); },
          "The key of the block before, or the root key of the salt.");
  nb::class_<KVTransfer>(
      m, "KVTransfer",
      "A block to copy to stores or from one; see take_offloads() and fetch().\n\n"
      "Example::\n\n    store.get(transfer.key, out)")
      .def_ro("block", &KVTransfer::block, "Its id in the pool.")
      .def_prop_ro(
          "tier", [](const KVTransfer& t) { return tier_name(t.tier); },
          "Of the store: \"host\" or \"file\".")
      .def_prop_ro(
          "key", [](const KVTransfer& t) { return bytes_of(t.key); }, "The chain key, 32 bytes.");
}

void bind_reports(nb::class_<PyManager>& manager) {
  manager
      .def("stats", &stats, nb::sig("def stats(self) -> quire._stats.KVCacheStats"),
           "Counts of blocks and tokens now, and of hits and evictions since the start.\n\n"
           "Example::\n\n    manager.stats().waste_tokens")
      .def(
          "take_events", [](PyManager& self) { return self.manager.take_events(); },
          "What happened to cached blocks since the last call, the oldest first.\n\n"
          "At most event_capacity are kept: of more the oldest are lost, which leaves a gap in\n"
          "CacheEvent.sequence and adds to stats().lost_events. Without a gap, the blocks stored\n"
          "and not removed, evicted or swapped since are those that prefixes can be found in; of a "
          "sequence\n"
          "that ends inside a block, that one too.\n\n"
          "Example::\n\n    for event in manager.take_events():\n        router.apply(event)")
      .def(
          "snapshot", [](const PyManager& self) { return self.manager.snapshot(); },
          "The whole state as JSON, but for attached stores and events.\n\n"
          "Raises ValueError while a fetch is under way.\n\n"
          "Example::\n\n    path.write_text(manager.snapshot())")
      .def(
          "sequences",
          [](nb::handle_t<PyManager> self) {
            PyManager& manager = *nb::inst_ptr<PyManager>(self);
            std::vector<PySequence> seqs;
            for (SequenceId id : manager.manager.sequences())
              seqs.push_back({nb::borrow(self), &manager, id});
            return seqs;
          },
          nb::sig("def sequences(self) -> list[Sequence]"),
          "All sequences that were not freed, in no order.\n\n"
          "Example::\n\n    manager.free(manager.sequences())");
  def_named(
      manager, "restore", [](std::string_view snapshot) { return new PyManager(snapshot); },
      nb::arg("snapshot"), nb::rv_policy::take_ownership,
      nb::sig("def restore(snapshot: str) -> KVCacheManager"),
      "A manager that goes on where the one of the snapshot was, with the same block ids.\n\n"
      "Its sequences are in sequences(). Where it keeps events, the first ones name what is\n"
      "cached. Raises ValueError for what is no consistent snapshot.\n\n"
      "Example::\n\n    manager = quire.KVCacheManager.restore(path.read_text())");
}

void bind_transfers(nb::class_<PyManager>& manager) {
  manager
      .def(
          "clear_cache", [](PyManager& self) { return self.manager.clear_cache(); },
          "Gives up all cached blocks that nobody uses; returns how many those were.\n\n"
          "For new weights, or what must not stay. Events say \"removed\", no store is offered\n"
          "them. What is in use stays findable, and stores keep what they have.\n\n"
          "Example::\n\n    manager.free(manager.sequences())\n    manager.clear_cache()")
      .def(named("set_time", [](PyManager& self, int64_t ns) { self.manager.set_time(ns); }),
           nb::arg("ns"), nb::sig("def set_time(self, ns: int) -> None"),
           "Counts times to live from and to this time, in ns, and not the system's any more.\n\n"
           "For tests, and for logs that have to run again as they ran. Raises ValueError outside\n"
           "0 to 2^60.\n\n"
           "Example::\n\n    manager.set_time(5_000_000_000)")
      .def(
          named("attach_store",
                [](PyManager& self, PyStore& s) { self.manager.attach_store(*s.store); }),
          nb::arg("store"), nb::keep_alive<1, 2>(),
          nb::sig("def attach_store(self, store: KVStore) -> None"),
          "Where fetch() looks and evicted blocks may go; the nearest first, one a tier.\n\n"
          "KVTiers attaches its stores itself. Raises ValueError without prefix caching, or for a\n"
          "second store of a tier.\n\n"
          "Example::\n\n    manager.attach_store(store)")
      .def(
          "take_offloads", [](PyManager& self) { return self.manager.take_offloads(); },
          "Whole blocks that the latest step(), schedule() of a Scheduler, fetch() or swap_in()\n"
          "evicted, and a store lacks.\n\n"
          "Their contents are lost unless they are put there before any KV is written. Each comes\n"
          "once.\n\n"
          "Example::\n\n    for transfer in manager.take_offloads():\n        ...")
      .def(
          named("fetch", [](PyManager& self,
                            const PySequence& s) { return list_of(self.manager.fetch(s.id)); }),
          nb::arg("seq"), nb::sig("def fetch(self, seq: Sequence) -> list[KVTransfer] | None"),
          "Gives a sequence blocks for what stores hold of its tokens behind the computed ones.\n\n"
          "The transfers, in order, are to be got from the store of their tier; then fetched()\n"
          "says how many came, and until then the sequence can do nothing. Of several layer "
          "groups\n"
          "each block is a transfer of its own. None when out of blocks: then nothing has "
          "changed.\n"
          "Raises ValueError after a step without commit.\n\n"
          "Example::\n\n    loads = manager.fetch(seq)")
      .def(named("fetched", [](PyManager& self, const PySequence& s,
                               int32_t n) { self.manager.fetched(s.id, n); }),
           nb::arg("seq"), nb::arg("num_blocks"),
           nb::sig("def fetched(self, seq: Sequence, num_blocks: int) -> None"),
           "The first num_blocks blocks of a fetch() hold their KV; the others are given back.\n\n"
           "What these make complete is computed now; of several layer groups that may be less.\n\n"
           "Example::\n\n    manager.fetched(seq, len(loads))")
      .def(named("swap_out",
                 [](PyManager& self, const PySequence& s) {
                   return pairs_of(self.manager.swap_out(s.id));
                 }),
           nb::arg("seq"),
           nb::sig("def swap_out(self, seq: Sequence) -> "
                   "numpy.typing.NDArray[numpy.int32] | None"),
           "Moves a sequence to host memory: (block, host block) to copy, int32 [n, 2].\n\n"
           "It holds no block of the pool until swap_in(). Of a window or a chunk that a layer "
           "group\n"
           "reads, its blocks alone. None when there are too few host blocks: then nothing has\n"
           "changed. With a state group, raises ValueError between step and commit.\n\n"
           "Example::\n\n    quire.swap_blocks(cache, host_cache, manager.swap_out(seq))")
      .def(named("swap_in",
                 [](PyManager& self, const PySequence& s) {
                   return pairs_of(self.manager.swap_in(s.id));
                 }),
           nb::arg("seq"),
           nb::sig("def swap_in(self, seq: Sequence) -> "
                   "numpy.typing.NDArray[numpy.int32] | None"),
           "Brings a sequence back: (host block, block) to copy, int32 [n, 2], all or nothing.\n\n"
           "What the prefix cache still has needs no copy. None when out of blocks.\n\n"
           "Example::\n\n    quire.swap_blocks(host_cache, cache, manager.swap_in(seq))")
      .def(named("is_swapped_out",
                 [](const PyManager& self, const PySequence& s) {
                   return self.manager.is_swapped_out(s.id);
                 }),
           nb::arg("seq"), nb::sig("def is_swapped_out(self, seq: Sequence) -> bool"),
           "Whether a sequence waits in host memory.\n\n"
           "Example::\n\n    manager.is_swapped_out(seq)");
}

}  // namespace

void bind_kv_tiers(nb::module_& m, nb::class_<PyManager>& manager) {
  bind_values(m);
  bind_reports(manager);
  bind_transfers(manager);
}

}  // namespace quire::python
