// SPDX-License-Identifier: Apache-2.0
// LayerGroup: a kind by its name, and its size under the name that the kind gives it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <optional>

#include "kv_cache.h"
#include "named.h"
#include "quire/error.h"

namespace quire::python {
namespace {

using Kind = LayerGroup::Kind;

constexpr const char* kNames[] = {"full", "sliding_window", "chunked_local", "state"};

const char* name_of(const LayerGroup& group) { return kNames[static_cast<int>(group.kind)]; }

Kind parse_kind(std::string_view name) {
  for (int i = 0; i < 4; ++i)
    if (name == kNames[i]) return static_cast<Kind>(i);
  throw InvalidArgument(concat(
      "LayerGroup: kind: expected full, sliding_window, chunked_local or state, got ", name));
}

int32_t parse_size(Kind kind, Kind wanted, const char* name, std::optional<int32_t> size) {
  QUIRE_CHECK_ARG((kind == wanted) == size.has_value(), "LayerGroup: ", name, ": expected ",
                  kind == wanted ? "a number of tokens" : "none", " for kind ",
                  kNames[static_cast<int>(kind)], size ? concat(", got ", *size) : "");
  QUIRE_CHECK_ARG(!size || *size >= 1, "LayerGroup: ", name, ": expected 1 token or more, got ",
                  *size);
  return size.value_or(0);
}

LayerGroup make_group(std::string_view name, std::optional<int32_t> window,
                      std::optional<int32_t> chunk) {
  const Kind kind = parse_kind(name);
  return {kind, parse_size(kind, Kind::kSlidingWindow, "window", window) +
                    parse_size(kind, Kind::kChunkedLocal, "chunk", chunk)};
}

std::string repr(const LayerGroup& group) {
  const std::string start = concat("LayerGroup('", name_of(group), "'");
  if (group.kind == Kind::kSlidingWindow) return concat(start, ", window=", group.size, ")");
  if (group.kind == Kind::kChunkedLocal) return concat(start, ", chunk=", group.size, ")");
  return start + ")";
}

nb::object size_if(const LayerGroup& group, Kind kind) {
  return group.kind == kind ? nb::cast(group.size) : nb::none();
}

}  // namespace

void bind_layer_groups(nb::module_& m) {
  nb::class_<LayerGroup>(
      m, "LayerGroup",
      "Layers of a model that keep the same part of the KV, for KVCacheManager(groups=...).\n\n"
      "Kinds: \"full\" attention; \"sliding_window\": the last `window` tokens, the token's own\n"
      "included, as paged_attention(window=(window - 1, 0)); \"chunked_local\": tokens since\n"
      "position p // chunk * chunk; \"state\": one block a sequence, as of Mamba. Groups with\n"
      "many layers may be named more than once, so that all have as many.\n\n"
      "Every group has blocks of its own, all out of one pool. What no later token reads goes\n"
      "back when commit() has moved on: its entries of the block table are -1. A cached prefix\n"
      "is found as far as every group has what it needs: a window its last tokens, a state a\n"
      "checkpoint, which is kept wherever a step ended with a block. The first group is full\n"
      "attention; a model without such layers takes one full group for all.\n\n"
      "Raises ValueError for another kind, or a window or chunk below 1 or of the wrong kind.\n\n"
      "Example::\n\n"
      "    local = quire.LayerGroup(\"sliding_window\", window=1024)\n"
      "    manager = quire.KVCacheManager(4096, 16, groups=[quire.LayerGroup(), local])\n"
      "    batch = manager.step(seqs, counts)\n"
      "    batch.groups[1].block_table        # of the windowed layers")
      .def(named("__init__",
                 [](LayerGroup* self, std::string_view kind, std::optional<int32_t> window,
                    std::optional<int32_t> chunk) {
                   new (self) LayerGroup(make_group(kind, window, chunk));
                 }),
           nb::arg("kind") = "full", nb::kw_only(), nb::arg("window") = nb::none(),
           nb::arg("chunk") = nb::none(),
           nb::sig("def __init__(self, kind: typing.Literal['full', 'sliding_window', "
                   "'chunked_local', 'state'] = 'full', *, window: int | None = None, "
                   "chunk: int | None = None) -> None"))
      .def_prop_ro("kind", &name_of, "full, sliding_window, chunked_local or state.")
      .def_prop_ro(
          "window", [](const LayerGroup& g) { return size_if(g, Kind::kSlidingWindow); },
          nb::for_getter(nb::sig("def window(self) -> int | None")), "Tokens of a sliding window.")
      .def_prop_ro(
          "chunk", [](const LayerGroup& g) { return size_if(g, Kind::kChunkedLocal); },
          nb::for_getter(nb::sig("def chunk(self) -> int | None")), "Tokens of a chunk.")
      .def("__repr__", &repr);
}

}  // namespace quire::python
