// SPDX-License-Identifier: Apache-2.0
// The calls of KVCacheManager that take batches, and the batch of a step.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "kv_cache.h"
#include "named.h"
#include "quire/error.h"

namespace quire::python {
namespace {

using Manager = nb::handle_t<PyManager>;

PyManager& of(Manager self) { return *nb::inst_ptr<PyManager>(self); }

// The sequences of a call: an int64 array of Sequence.id (read in place), or a list of Sequence.
class SeqsArg {
 public:
  SeqsArg(const char* function, nb::handle seqs) {
    if (nb::isinstance<nb::list>(seqs))
      parse_list(function, nb::borrow<nb::list>(seqs));
    else
      parse_array(concat(function, ": seqs").c_str(), seqs);
  }
  operator std::span<const SequenceId>() const { return ids_; }
  size_t size() const { return ids_.size(); }

 private:
  void parse_list(const char* function, nb::list seqs) {
    const nb::ft_object_guard guard(seqs);  // its items are borrowed
    const nb::handle type = nb::type<PySequence>();
    list_.reserve(nb::len(seqs));
    for (size_t i = 0, n = nb::len(seqs); i < n; ++i) {
      PyObject* seq = PyList_GetItem(seqs.ptr(), static_cast<Py_ssize_t>(i));
      if (Py_TYPE(seq) != reinterpret_cast<PyTypeObject*>(type.ptr())) {
        const std::string message = concat(function, ": seqs[", i, "]: expected a Sequence, got ",
                                           nb::cast<std::string>(nb::inst_name(seq)));
        throw nb::type_error(message.c_str());
      }
      list_.push_back(nb::inst_ptr<PySequence>(seq)->id);
    }
    ids_ = list_;
  }

  void parse_array(const char* name, nb::handle seqs) {
    static_assert(sizeof(SequenceId) == sizeof(int64_t));
    const TensorView view = args_.input(seqs, name);
    QUIRE_CHECK_ARG(view.dtype == DType::kInt64 && view.ndim == 1, name,
                    ": expected a list of Sequence or a one-dimensional int64 array of their ids, "
                    "got ",
                    describe(view));
    QUIRE_CHECK_ARG(view.shape[0] <= 1 || view.strides[0] == 1, name,
                    ": expected a contiguous array, got stride ", view.strides[0]);
    ids_ = {reinterpret_cast<const SequenceId*>(view.data), static_cast<size_t>(view.shape[0])};
  }

  TensorArgs args_;
  std::vector<SequenceId> list_;
  std::span<const SequenceId> ids_;
};

std::optional<PyStepBatch> step(Manager self, nb::handle seqs, nb::handle num_new_tokens,
                                int32_t lookahead) {
  PyManager& manager = of(self);
  const Int32Arg counts(num_new_tokens, "step: num_new_tokens");
  const SeqsArg ids("step", seqs);
  const nb::ft_object_guard guard(self);  // see PyStepBatch
  const StepBatch* batch = manager.manager.step(ids, {counts.data(), counts.size()}, lookahead);
  if (!batch) return std::nullopt;
  return PyStepBatch{nb::borrow(self), &manager, batch->ticket()};
}

// A list whose items are arrays or lists: new tokens of each sequence, any number.
bool is_ragged(nb::handle sampled) {
  if (!nb::isinstance<nb::list>(sampled)) return false;
  const nb::list items = nb::borrow<nb::list>(sampled);
  return nb::len(items) > 0 && nb::hasattr(items[0], "__len__");
}

void commit(Manager self, nb::handle seqs, nb::handle sampled) {
  PyManager& manager = of(self);
  const SeqsArg ids("commit", seqs);
  if (sampled.is_none()) return manager.manager.commit(ids);
  if (!is_ragged(sampled)) {
    const Int32Arg tokens(sampled, "commit: sampled");
    QUIRE_CHECK_ARG(tokens.size() == ids.size(), "commit: sampled: expected ", ids.size(),
                    " tokens, one a sequence, got ", tokens.size());
    return manager.manager.commit(ids, {tokens.data(), tokens.size()});
  }
  std::vector<int32_t> tokens, counts;
  for (nb::handle item : nb::borrow<nb::list>(sampled)) {
    const Int32Arg part(item, "commit: sampled: an item");
    tokens.insert(tokens.end(), part.data(), part.data() + part.size());
    counts.push_back(static_cast<int32_t>(part.size()));
  }
  manager.manager.commit(ids, tokens, counts);
}

nb::list group_stats(const PyManager& self) {
  nb::list groups;
  for (const LayerGroupStats& stats : self.manager.group_stats()) {
    nb::dict d;
    d["used_blocks"] = stats.used_blocks;
    d["cached_blocks"] = stats.cached_blocks;
    groups.append(d);
  }
  return groups;
}

// A property that shows a whole array of the step.
template <auto Array, auto View>
nb::object step_array(const PyStepBatch& batch) {
  return batch.read([&](const StepBatch& step) {
    const auto& array = (step.*Array)();
    return (batch.views().*View).get(array, array.size());
  });
}

// A property that shows pairs, [n, 2].
template <auto Array, auto View>
nb::object step_pairs(const PyStepBatch& batch) {
  return batch.read([&](const StepBatch& step) {
    const auto& array = (step.*Array)();
    return (batch.views().*View).get(array, array.size() / 2, 2, 2);
  });
}

}  // namespace

const StepBatch& PyStepBatch::get() const {
  const StepBatch& latest = manager->manager.batch(group);
  QUIRE_CHECK_ARG(latest.ticket() == ticket, "StepBatch: expected the batch of the latest step, ",
                  latest.ticket(), ", got that of step ", ticket);
  return latest;
}

void bind_step_batch(nb::module_& m) {
  nb::class_<PyStepBatch>(
      m, "StepBatch",
      "The arrays of one step. They are views of memory that the next step overwrites, whichever\n"
      "thread calls it: after it, the properties raise ValueError.\n\n"
      "Example::\n\n    plan = attn.plan(batch.block_table, batch.seq_lens, batch.cu_seqlens_q)\n"
      "    quire.copy_blocks(k_cache, v_cache, batch.copies)\n"
      "    quire.append_kv(k, v, k_cache, v_cache, batch.slot_mapping)")
      .def_ro("ticket", &PyStepBatch::ticket, "The step's number, 1, 2, ..., for retire().")
      .def_prop_ro(
          "groups",
          [](const PyStepBatch& b) {
            std::vector<PyStepBatch> groups(b.manager->views.size(), b);
            for (size_t i = 0; i < groups.size(); ++i) groups[i].group = static_cast<int32_t>(i);
            return groups;
          },
          "The step as each layer group sees it: own block_table, slot_mapping, copies, "
          "changes.\n\n"
          "The first is the step itself.")
      .def_prop_ro(
          "block_table",
          [](const PyStepBatch& b) {
            return b.read([&](const StepBatch& step) {
              return b.views().block_table.get(step.block_table(), step.batch_size(),
                                               step.max_blocks(), step.block_table_stride());
            });
          },
          nb::for_getter(nb::sig("def block_table(self) -> numpy.typing.NDArray[numpy.int32]")),
          "Block ids, int32 [batch, max_blocks]; what lies beyond seq_lens has no meaning.\n\n"
          "-1: a block that a layer group has given back. Of a state group [batch, 1]: the block\n"
          "whose state the step reads (unless it begins at position 0) and then overwrites.")
      .def_prop_ro(
          "slot_mapping", &step_array<&StepBatch::slot_mapping, &StepViews::slot_mapping>,
          nb::for_getter(nb::sig("def slot_mapping(self) -> numpy.typing.NDArray[numpy.int64]")),
          "Where each new token's KV goes, int64 [total new tokens]: block * block_size + offset.\n"
          "Of a state group empty.")
      .def_prop_ro(
          "seq_lens", &step_array<&StepBatch::seq_lens, &StepViews::seq_lens>,
          nb::for_getter(nb::sig("def seq_lens(self) -> numpy.typing.NDArray[numpy.int32]")),
          "Tokens of each sequence, the new ones included, int32 [batch].")
      .def_prop_ro(
          "cu_seqlens_q", &step_array<&StepBatch::cu_seqlens_q, &StepViews::cu_seqlens_q>,
          nb::for_getter(nb::sig("def cu_seqlens_q(self) -> numpy.typing.NDArray[numpy.int32]")),
          "Where the new tokens of each sequence begin, int32 [batch + 1].")
      .def_prop_ro(
          "positions", &step_array<&StepBatch::positions, &StepViews::positions>,
          nb::for_getter(nb::sig("def positions(self) -> numpy.typing.NDArray[numpy.int32]")),
          "Position of each new token in its sequence, int32 [total new tokens].")
      .def_prop_ro("copies", &step_pairs<&StepBatch::copies, &StepViews::copies>,
                   nb::for_getter(nb::sig("def copies(self) -> numpy.typing.NDArray[numpy.int32]")),
                   "Blocks (source, destination) to copy before KV is written, int32 [copies, 2].")
      .def_prop_ro(
          "changes", &step_pairs<&StepBatch::changes, &StepViews::changes>,
          nb::for_getter(nb::sig("def changes(self) -> numpy.typing.NDArray[numpy.int32]")),
          "Entries of block_table that this step wrote, int32 [changes, 2]: (index, block).\n\n"
          "The index is row * stride + column, with the row stride of block_table in elements.\n"
          "A copy on a device that had all changes so far needs these alone, unless block_table's\n"
          "stride or memory is another than before: then all entries in use are here.");
}

void bind_kv_steps(nb::class_<PyManager>& manager) {
  manager
      .def(named("free", [](PyManager& self,
                            nb::handle seqs) { self.manager.free(SeqsArg("free", seqs)); }),
           nb::arg("seqs"),
           nb::sig("def free(self, seqs: list[Sequence] | numpy.typing.NDArray[numpy.int64]) -> "
                   "None"),
           "Ends sequences; what they computed stays cached as long as there is room.\n\n"
           "Raises ValueError for a sequence that was freed before, or is named twice.\n\n"
           "Example::\n\n    manager.free([seq])")
      .def(named("step", &step), nb::arg("seqs"), nb::arg("num_new_tokens"), nb::kw_only(),
           nb::arg("lookahead") = 0,
           nb::sig("def step(self, seqs: list[Sequence] | numpy.typing.NDArray[numpy.int64], "
                   "num_new_tokens: numpy.typing.ArrayLike, *, lookahead: int = 0) -> "
                   "StepBatch | None"),
           "Gives slots to the next tokens of each sequence, int32 [batch] known ones.\n\n"
           "`seqs`: a list, or an int64 array of Sequence.id. With `lookahead` the rows of\n"
           "block_table reach that many tokens farther: room for drafts not yet known.\n\n"
           "None when out of blocks: then nothing has changed. A second step without commit\n"
           "plans the same tokens again. Raises ValueError for a freed sequence, one named\n"
           "twice, or a count that is negative or beyond the known tokens.\n\n"
           "Example::\n\n    batch = manager.step(seqs, np.ones(len(seqs), np.int32))")
      .def(named("commit", &commit), nb::arg("seqs"), nb::arg("sampled") = nb::none(),
           nb::sig("def commit(self, seqs: list[Sequence] | numpy.typing.NDArray[numpy.int64], "
                   "sampled: numpy.typing.ArrayLike | list[numpy.typing.ArrayLike] | None = None) "
                   "-> None"),
           "The KV of the stepped tokens is written: full blocks become shareable.\n\n"
           "`sampled` appends new tokens: int32 [batch], one each, or a list of arrays.\n"
           "Raises ValueError for a wrong length, or tokens for a sequence whose step left\n"
           "known tokens to compute.\n\n"
           "Example::\n\n    manager.commit(seqs, logits.argmax(-1).astype(np.int32))")
      .def(named("retire", [](PyManager& self, int64_t ticket) { self.manager.retire(ticket); }),
           nb::arg("ticket"), nb::sig("def retire(self, ticket: int) -> None"),
           "The step of this ticket and all before it have run; needs async_depth > 0.\n\n"
           "Blocks freed or copied from meanwhile rejoin the pool. Raises ValueError for a\n"
           "ticket that was retired or never given.\n\n"
           "Example::\n\n    manager.retire(batch.ticket)")
      .def("group_stats", &group_stats, nb::sig("def group_stats(self) -> list[dict[str, int]]"),
           "Blocks of each layer group: used_blocks, that sequences hold, and cached_blocks, that\n"
           "nobody holds.\n\n"
           "Example::\n\n    manager.group_stats()[1][\"used_blocks\"]")
      .def(
          "validate", [](const PyManager& self) { self.manager.validate(); },
          "Checks every count, list and reference; raises RuntimeError for a broken one.\n\n"
          "Example::\n\n    manager.validate()");
}

}  // namespace quire::python
