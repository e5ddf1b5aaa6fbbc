// SPDX-License-Identifier: Apache-2.0
#include <nanobind/ndarray.h>

#include <deque>

#include "named.h"
#include "quire/block_ranges.h"
#include "quire/error.h"
#include "tensor.h"

namespace quire::python {
namespace {

// Rows of equal values as an int64 array of its own.
template <class Row, class Fill>
nb::object int64_rows(const std::vector<Row>& rows, size_t columns, Fill fill) {
  auto* values = new int64_t[rows.size() * columns];
  const nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<int64_t*>(p); });
  for (size_t i = 0; i < rows.size(); ++i) fill(rows[i], values + i * columns);
  const size_t shape[] = {rows.size(), columns};
  return nb::cast(nb::ndarray<nb::numpy, int64_t>(values, 2, shape, owner));
}

int64_t as_number(const void* address) { return reinterpret_cast<intptr_t>(address); }

template <auto Function>
nb::object ranges_of(const std::string& name, nb::sequence pools, nb::handle blocks,
                     TensorView (TensorArgs::*get)(nb::handle, const char*)) {
  std::deque<TensorArgs> args;  // one a pool: a model may have any number of layers
  std::vector<TensorView> views;
  for (nb::handle pool : pools) {
    const std::string argument = concat(name, ": pools[", views.size(), "]");
    views.push_back((args.emplace_back().*get)(pool, argument.c_str()));
  }
  const Int32Arg ids(blocks, concat(name, ": blocks").c_str());
  const std::vector<MemoryRange> ranges = Function(views, {ids.data(), ids.size()});
  return int64_rows(ranges, 2, [](const MemoryRange& range, int64_t* row) {
    row[0] = as_number(range.data);
    row[1] = static_cast<int64_t>(range.size);
  });
}

std::vector<MemoryRange> as_ranges(nb::handle object, const char* name) {
  TensorArgs args;
  const TensorView rows = args.input(object, name);
  QUIRE_CHECK_ARG(rows.ndim == 2 && rows.shape[1] == 2 && rows.dtype == DType::kInt64, name,
                  ": expected [n, 2] int64 (address, bytes), got ", describe(rows));
  std::vector<MemoryRange> ranges;
  for (int64_t i = 0; i < rows.shape[0]; ++i) {
    const int64_t* row = rows.as<int64_t>() + i * rows.strides[0];
    const int64_t size = row[rows.strides[1]];
    QUIRE_CHECK_ARG(size >= 0, name, "[", i, "]: expected 0 bytes or more, got ", size);
    ranges.push_back(
        {reinterpret_cast<void*>(static_cast<intptr_t>(row[0])), static_cast<size_t>(size)});
  }
  return ranges;
}

nb::object pairs_of(nb::handle sources, nb::handle destinations) {
  const auto pairs = pair_ranges(as_ranges(sources, "pair_ranges: sources"),
                                 as_ranges(destinations, "pair_ranges: destinations"));
  return int64_rows(pairs, 3, [](const RangePair& pair, int64_t* row) {
    row[0] = as_number(pair.source);
    row[1] = as_number(pair.destination);
    row[2] = static_cast<int64_t>(pair.size);
  });
}

}  // namespace

void bind_block_ranges(nb::module_& m) {
  def_named(
      m, "export_blocks",
      [](nb::sequence pools, nb::handle blocks) {
        return ranges_of<&export_blocks>("export_blocks", pools, blocks, &TensorArgs::input);
      },
      nb::arg("pools"), nb::arg("blocks"),
      nb::sig("def export_blocks(pools: collections.abc.Sequence[typing.Any], "
              "blocks: numpy.typing.ArrayLike) -> numpy.typing.NDArray[numpy.int64]"),
      "Where blocks lie, to be read by what carries them: int64 [n, 2], (address, bytes).\n\n"
      "`pools`: tensors [num_blocks, ...] of any dtype, device and framework, the last dimension\n"
      "contiguous: KVCache.pools, or views of your own; `blocks`: int32 ids. Blocks of pool 0\n"
      "come first, in the order given, each in the order of its strides, the longest first;\n"
      "neighbours are merged. Both ends agree on what byte goes where if their pools have the\n"
      "same shapes but for num_blocks, dtypes and order of dimensions. Nothing is read; the\n"
      "addresses hold as long as the pools live.\n\n"
      "Raises ValueError for a block id outside a pool, and for a tensor that is no pool.\n\n"
      "Example::\n\n    ranges = quire.export_blocks(cache.pools, seq.block_table)");
  def_named(
      m, "import_blocks",
      [](nb::sequence pools, nb::handle blocks) {
        return ranges_of<&import_blocks>("import_blocks", pools, blocks, &TensorArgs::output);
      },
      nb::arg("pools"), nb::arg("blocks"),
      nb::sig("def import_blocks(pools: collections.abc.Sequence[typing.Any], "
              "blocks: numpy.typing.ArrayLike) -> numpy.typing.NDArray[numpy.int64]"),
      "Where blocks are to be written: the list of export_blocks, for the other end.\n\n"
      "Raises ValueError also for a block that is named twice, and for memory that is read-only\n"
      "or would be written twice.\n\n"
      "Example::\n\n    ranges = quire.import_blocks(cache.pools, seq.block_table)");
  def_named(
      m, "pair_ranges", &pairs_of, nb::arg("sources"), nb::arg("destinations"),
      nb::sig("def pair_ranges(sources: numpy.typing.NDArray[numpy.int64], "
              "destinations: numpy.typing.NDArray[numpy.int64]) -> "
              "numpy.typing.NDArray[numpy.int64]"),
      "Cuts two lists of as many bytes into pieces of one size: int64 [n, 3], (source address,\n"
      "destination address, bytes), for transfers that name both ends.\n\n"
      "Raises ValueError for lists of different sizes.\n\n"
      "Example::\n\n    pieces = quire.pair_ranges(theirs, quire.import_blocks(cache.pools, "
      "ids))");
}

}  // namespace quire::python
