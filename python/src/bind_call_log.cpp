// SPDX-License-Identifier: Apache-2.0
// The writer that RecordedKVCacheManager (python/quire) feeds, and replay.
#include <nanobind/stl/optional.h>

#include <cerrno>
#include <fstream>
#include <iterator>
#include <system_error>

#include "named.h"
#include "quire/call_log.h"
#include "tensor.h"

namespace quire::python {
namespace {

[[noreturn]] void throw_errno(const std::string& path) {
  throw std::system_error(errno, std::generic_category(), path);
}

class PyCallLogWriter {
 public:
  PyCallLogWriter(const std::string& path, const CallLogConfig& config)
      : out_(path, std::ios::binary), writer_(out_, config) {
    if (!out_) throw_errno(path);
  }

  // `results`: int32 and int64 arrays, in the order that ResultCheck wants.
  void write(int operation, int outcome, std::vector<int64_t> seqs, std::vector<int32_t> values,
             std::vector<int32_t> counts, std::optional<std::string> salt, int64_t number,
             nb::list results) {
    ResultCheck check;
    for (nb::handle result : results) {
      TensorArgs args;
      const TensorView view = args.input(result, "CallLogWriter: results");
      const auto size =
          static_cast<size_t>(view.ndim == 1 ? view.shape[0] : view.shape[0] * view.shape[1]);
      if (view.dtype == DType::kInt64)
        check.add(std::span(view.as<const int64_t>(), size));
      else
        check.add(std::span(view.as<const int32_t>(), size));
    }
    writer_.write({static_cast<LoggedCall::Operation>(operation),
                   static_cast<LoggedCall::Outcome>(outcome), std::move(seqs), std::move(values),
                   std::move(counts), std::move(salt), number, check.value()});
  }

 private:
  std::ofstream out_;
  CallLogWriter writer_;
};

nb::tuple replay_calls(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw_errno(path);
  const std::string log{std::istreambuf_iterator<char>(in), {}};
  const ReplayReport report = replay(std::as_bytes(std::span(log)));
  return nb::make_tuple(report.num_calls, report.difference);
}

}  // namespace

void bind_call_log(nb::module_& m) {
  nb::class_<PyCallLogWriter>(m, "CallLogWriter", "Used by RecordedKVCacheManager.")
      .def(named(
               "__init__",
               [](PyCallLogWriter* self, const std::string& path, int32_t num_blocks,
                  int32_t block_size, bool prefix_caching, int32_t async_depth, int32_t eviction,
                  int32_t event_capacity, int32_t num_host_blocks, std::vector<LayerGroup> groups) {
                 new (self) PyCallLogWriter(path, {num_blocks,
                                                   block_size,
                                                   prefix_caching,
                                                   async_depth,
                                                   {static_cast<Eviction>(eviction), event_capacity,
                                                    num_host_blocks, std::move(groups)}});
               }),
           nb::arg("path"), nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("prefix_caching"),
           nb::arg("async_depth"), nb::arg("eviction"), nb::arg("event_capacity"),
           nb::arg("num_host_blocks"), nb::arg("groups"),
           nb::sig("def __init__(self, path: str, num_blocks: int, block_size: int, "
                   "prefix_caching: bool, async_depth: int, eviction: int, event_capacity: int, "
                   "num_host_blocks: int, groups: list[LayerGroup]) -> None"))
      .def("write", &PyCallLogWriter::write, nb::lock_self(), nb::arg("operation"),
           nb::arg("outcome"), nb::arg("seqs"), nb::arg("values"), nb::arg("counts"),
           nb::arg("salt").none(), nb::arg("number"), nb::arg("results"),
           nb::sig("def write(self, operation: int, outcome: int, seqs: list[int], values: "
                   "list[int], counts: list[int], salt: str | None, number: int, results: "
                   "list[typing.Any]) -> None"),
           "One call and its results.");
  def_named(
      m, "replay_calls", &replay_calls, nb::arg("path"),
      nb::sig("def replay_calls(path: str) -> tuple[int, str | None]"),
      "Runs the calls of a log of RecordedKVCacheManager on a new manager.\n\n"
      "Returns how many calls gave what they gave when recorded, block ids included, and the\n"
      "first difference as text or None. A log that ends within a call, as after a crash, is\n"
      "replayed up to there. Raises ValueError for what is no log, OSError for a file that\n"
      "can't be read, RuntimeError where the manager ends up inconsistent.\n\n"
      "Example::\n\n    num_calls, difference = quire.replay_calls(\"calls.quirelog\")\n"
      "    assert difference is None, difference");
}

}  // namespace quire::python
