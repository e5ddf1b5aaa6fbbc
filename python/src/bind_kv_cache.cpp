// SPDX-License-Identifier: Apache-2.0
// KVCacheManager, its sequences and the batch of a step.
#include "kv_cache.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "named.h"
#include "quire/error.h"

namespace quire::python {
namespace {

using Manager = nb::handle_t<PyManager>;

PyManager& of(Manager self) { return *nb::inst_ptr<PyManager>(self); }

// Takes the values over.
nb::object array_of(std::vector<int32_t> values) {
  auto* kept = new std::vector<int32_t>(std::move(values));
  const nb::capsule owner(kept,
                          [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
  const size_t shape[] = {kept->size()};
  return nb::cast(nb::ndarray<nb::numpy, int32_t>(kept->data(), 1, shape, owner));
}

PySequence create(Manager self, nb::handle token_ids, Salt salt, int32_t priority,
                  std::optional<double> ttl) {
  const Int32Arg tokens(token_ids, "create: token_ids");
  Retention retention;
  retention.priority = priority;
  if (ttl) retention.ttl = *ttl;
  return {nb::borrow(self), &of(self),
          of(self).manager.create({tokens.data(), tokens.size()}, salt, retention)};
}

PySequence fork(Manager self, const PySequence& seq) {
  return {nb::borrow(self), &of(self), of(self).manager.fork(seq.id)};
}

nb::list fork_many(Manager self, const PySequence& seq, int64_t n) {
  PyManager& manager = of(self);
  QUIRE_CHECK_ARG(n >= 0 && n <= INT32_MAX, "fork: n: expected 0 or more, got ", n);
  std::vector<SequenceId> ids(static_cast<size_t>(n));
  manager.manager.fork(seq.id, ids);
  nb::list children;
  for (SequenceId id : ids) children.append(nb::cast(PySequence{nb::borrow(self), &manager, id}));
  return children;
}

// pin() and unpin(): of a Sequence, or of a cached prefix.
int64_t change_pins(PyManager& self, nb::handle what, Salt salt, bool pins) {
  KVCacheManager& manager = self.manager;
  if (nb::isinstance<PySequence>(what)) {
    const SequenceId id = nb::inst_ptr<PySequence>(what)->id;
    return pins ? manager.pin(id) : manager.unpin(id);
  }
  const Int32Arg tokens(what, pins ? "pin: what" : "unpin: what");
  const std::span<const int32_t> ids(tokens.data(), tokens.size());
  return pins ? manager.pin(ids, salt) : manager.unpin(ids, salt);
}

int64_t match(Manager self, nb::handle token_ids, Salt salt) {
  const Int32Arg tokens(token_ids, "match: token_ids");
  nb::gil_scoped_release unlocked;  // so that the thread that steps may
  return of(self).manager.match({tokens.data(), tokens.size()}, salt).num_tokens;
}

KVCacheStats stats_of(const PyManager& self) {
  nb::gil_scoped_release unlocked;
  return self.manager.stats();
}

// One of the allocator's counts.
template <auto Count>
int32_t count_of(const PyManager& self) {
  const auto lock = self.manager.lock();
  return (self.manager.allocator().*Count)();
}

Eviction eviction_of(std::string_view name) {
  QUIRE_CHECK_ARG(name == "lru" || name == "reuse_lru",
                  "KVCacheManager: eviction: expected \"lru\" or \"reuse_lru\", got \"", name,
                  "\"");
  return name == "lru" ? Eviction::kLru : Eviction::kReuseLru;
}

void bind_sequence(nb::module_& m) {
  nb::class_<PySequence>(
      m, "Sequence",
      "A handle of KVCacheManager.create() or fork(); valid until KVCacheManager.free().\n\n"
      "Every property raises ValueError once the sequence is freed.\n\n"
      "Example::\n\n    seq = manager.create(prompt)\n"
      "    todo = seq.num_tokens - seq.num_computed_tokens")
      .def_prop_ro(
          "num_tokens", [](const PySequence& s) { return s.manager->manager.num_tokens(s.id); },
          "Known tokens.")
      .def_prop_ro(
          "num_computed_tokens",
          [](const PySequence& s) { return s.manager->manager.num_computed_tokens(s.id); },
          "Leading tokens whose KV is in the cache.")
      .def_prop_ro(
          "num_cached_tokens",
          [](const PySequence& s) { return s.manager->manager.num_cached_tokens(s.id); },
          "Leading tokens whose KV was there when the sequence was created.")
      .def_prop_ro(
          "id", [](const PySequence& s) { return s.id.value; },
          "A number unique in the process; step(), commit() and free() take int64 arrays of them.")
      .def_prop_ro(
          "token_ids",
          [](const PySequence& s) { return array_of(s.manager->manager.tokens(s.id)); },
          nb::for_getter(nb::sig("def token_ids(self) -> numpy.typing.NDArray[numpy.int32]")),
          "The known tokens, int32 [num_tokens], a copy.")
      .def_prop_ro(
          "block_table",
          [](const PySequence& s) { return array_of(s.manager->manager.block_table(s.id)); },
          nb::for_getter(nb::sig("def block_table(self) -> numpy.typing.NDArray[numpy.int32]")),
          "Ids of the sequence's blocks, int32 [num_blocks], a copy.")
      .def_prop_ro(
          "block_tables",
          [](const PySequence& s) {
            nb::list tables;
            for (int32_t group = 0; group < s.manager->manager.num_groups(); ++group)
              tables.append(array_of(s.manager->manager.block_table(s.id, group)));
            return tables;
          },
          nb::for_getter(
              nb::sig("def block_tables(self) -> list[numpy.typing.NDArray[numpy.int32]]")),
          "The same of each layer group; -1: given back. Of a state its one block, or none.");
}

nb::class_<PyManager> bind_manager(nb::module_& m) {
  return nb::class_<PyManager>(
             m, "KVCacheManager",
             "The sequences of an engine and the blocks that hold their KV.\n\n"
             "`prefix_caching` shares the blocks of equal prefixes; `async_depth` is how many\n"
             "steps may run while the host plans on (see retire). `eviction`: \"lru\", or\n"
             "\"reuse_lru\", which keeps longer what was hit before. `event_capacity`: events "
             "kept\n"
             "for take_events(). `num_host_blocks`: for swap_out(). `groups`: what the model's\n"
             "layers read, the first full attention; see LayerGroup.\n\n"
             "Any number of threads may call every method. match() and stats() release the GIL\n"
             "and give way to the others after every few blocks, so that they don't hold up "
             "whoever\n"
             "plans the steps. A StepBatch is for the thread that steps.\n\n"
             "Steps of the same sequences with one token each cost least, with all arguments as\n"
             "arrays: `ids = np.array([seq.id for seq in seqs])`.\n\n"
             "Raises ValueError for counts below 1 and wrong groups. Every method either does all "
             "it says or\n"
             "raises and changes nothing.\n\n"
             "Example::\n\n"
             "    manager = quire.KVCacheManager(num_blocks=4096, block_size=16)\n"
             "    seq = manager.create(prompt)\n"
             "    batch = manager.step([seq], [seq.num_tokens - seq.num_computed_tokens])\n"
             "    ...                                # run the model on the batch\n"
             "    manager.commit([seq], sampled)     # int32 [1]")
      .def(named("__init__",
                 [](PyManager* self, int32_t num_blocks, int32_t block_size, bool prefix_caching,
                    int32_t async_depth, std::string_view eviction, int32_t event_capacity,
                    int32_t num_host_blocks, std::vector<LayerGroup> groups) {
                   new (self) PyManager(
                       num_blocks, block_size, prefix_caching, async_depth,
                       {eviction_of(eviction), event_capacity, num_host_blocks, std::move(groups)});
                 }),
           nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("prefix_caching") = true,
           nb::arg("async_depth") = 0, nb::kw_only(), nb::arg("eviction") = "lru",
           nb::arg("event_capacity") = 0, nb::arg("num_host_blocks") = 0,
           nb::arg("groups") = nb::list(),
           nb::sig("def __init__(self, num_blocks: int, block_size: int, "
                   "prefix_caching: bool = True, async_depth: int = 0, *, eviction: str = 'lru', "
                   "event_capacity: int = 0, num_host_blocks: int = 0, "
                   "groups: collections.abc.Sequence[LayerGroup] = ()) -> None"))
      .def_prop_ro(
          "groups",
          [](const PyManager& p) {
            std::vector<LayerGroup> groups;
            for (int32_t i = 0; i < p.manager.num_groups(); ++i)
              groups.push_back(p.manager.group(i));
            return groups;
          },
          "The layer groups.")
      .def_prop_ro(
          "num_blocks", [](const PyManager& p) { return p.manager.allocator().num_blocks(); },
          "Blocks of the pool.")
      .def_prop_ro(
          "block_size", [](const PyManager& p) { return p.manager.allocator().block_size(); },
          "Tokens a block.")
      .def_prop_ro("num_free_blocks", &count_of<&BlockAllocator::num_free>,
                   "Blocks neither used nor cached; free + used + cached == num_blocks.")
      .def_prop_ro("num_used_blocks", &count_of<&BlockAllocator::num_used>,
                   "Blocks that sequences hold, each counted once.")
      .def_prop_ro("num_cached_blocks", &count_of<&BlockAllocator::num_cached>,
                   "Blocks that no sequence holds, kept for their contents until they are needed.")
      .def_prop_ro(
          "num_used_tokens", [](const PyManager& p) { return stats_of(p).used_tokens; },
          "Computed tokens of live sequences, those in shared blocks counted once.");
}

void bind_sequence_methods(nb::class_<PyManager>& manager) {
  manager
      .def(named("create", &create), nb::arg("token_ids"), nb::arg("salt") = nb::none(),
           nb::kw_only(), nb::arg("priority") = 0, nb::arg("ttl") = nb::none(),
           nb::sig("def create(self, token_ids: numpy.typing.ArrayLike, salt: str | None = None, "
                   "*, priority: int = 0, ttl: float | None = None) -> Sequence"),
           "A sequence of these tokens, int32 [n], that shares the cached prefix.\n\n"
           "At least the last token is left to compute. A prefix may end inside a block: the\n"
           "first step copies its tokens (StepBatch.copies). Sequences of different salts share\n"
           "nothing.\n\n"
           "Once nobody uses its blocks, those of lower `priority` (0 to 100) are evicted first,\n"
           "and of one priority the least recently used; `ttl` seconds later they count as the\n"
           "lowest. Of several sequences that held a block the highest priority counts.\n\n"
           "Raises ValueError for no tokens, a priority outside 0 to 100, or a negative ttl.\n\n"
           "Example::\n\n    seq = manager.create(np.array([1, 2, 3], np.int32))")
      .def(
          named("fork", &fork), nb::arg("seq"),
          nb::sig("def fork(self, seq: Sequence) -> Sequence"),
          "A sequence of the same tokens that shares every block with computed tokens.\n\n"
          "The first write into a shared partial block copies it: see StepBatch.copies. With a\n"
          "state group, raises ValueError between step and commit: the state may be the step's.\n\n"
          "Example::\n\n    child = manager.fork(seq)")
      .def(named("fork", &fork_many), nb::arg("seq"), nb::arg("n"),
           nb::sig("def fork(self, seq: Sequence, n: int) -> list[Sequence]"),
           "n such sequences, at a cost that does not grow with their length.\n\n"
           "Raises ValueError for a negative n.\n\n"
           "Example::\n\n    beams = manager.fork(seq, 8)")
      .def(named("truncate", [](PyManager& self, const PySequence& seq,
                                int64_t num_tokens) { self.manager.truncate(seq.id, num_tokens); }),
           nb::arg("seq"), nb::arg("num_tokens"),
           nb::sig("def truncate(self, seq: Sequence, num_tokens: int) -> None"),
           "Keeps the first num_tokens tokens, 1 or more: the rest was rejected.\n\n"
           "May come between step() and commit(). Where a layer group has given up what it needs\n"
           "to go on from there, the sequence computes tokens again: num_computed_tokens falls.\n\n"
           "Example::\n\n    manager.truncate(seq, seq.num_tokens - num_rejected)")
      .def(named("match", &match), nb::arg("token_ids"), nb::arg("salt") = nb::none(),
           nb::sig("def match(self, token_ids: numpy.typing.ArrayLike, salt: str | None = None) "
                   "-> int"),
           "How many tokens create() would find cached; no side effect.\n\n"
           "Example::\n\n    hit = manager.match(prompt)")
      .def(named("pin", [](PyManager& self, nb::handle what,
                           Salt salt) { return change_pins(self, what, salt, true); }),
           nb::arg("what"), nb::arg("salt") = nb::none(),
           nb::sig("def pin(self, what: Sequence | numpy.typing.ArrayLike, "
                   "salt: str | None = None) -> int"),
           "Keeps cached blocks from eviction until they are unpinned as often.\n\n"
           "`what`: a sequence, for its computed tokens, or the tokens of a prefix, int32 [n].\n"
           "Returns how many tokens that are: those of the whole blocks that are cached.\n\n"
           "Example::\n\n    manager.pin(system_prompt)")
      .def(named("unpin", [](PyManager& self, nb::handle what,
                             Salt salt) { return change_pins(self, what, salt, false); }),
           nb::arg("what"), nb::arg("salt") = nb::none(),
           nb::sig("def unpin(self, what: Sequence | numpy.typing.ArrayLike, "
                   "salt: str | None = None) -> int"),
           "Takes one pin() back; returns how many tokens were pinned.\n\n"
           "Example::\n\n    manager.unpin(system_prompt)");
}

}  // namespace

void bind_kv_cache(nb::module_& m) {
  bind_layer_groups(m);
  bind_sequence(m);
  bind_step_batch(m);
  nb::class_<PyManager> manager = bind_manager(m);
  bind_sequence_methods(manager);
  bind_kv_steps(manager);
  bind_kv_tiers(m, manager);
  bind_scheduler(m);
}

}  // namespace quire::python
