// SPDX-License-Identifier: Apache-2.0
// What this build and this machine can do.
#include "quire/backend.h"

#include "named.h"
#include "quire/error.h"
#include "quire/roofs.h"
#include "tensor.h"

namespace quire::python {
namespace {

nb::list capability_rows() {
  nb::list rows;
  for (const Capability& c : capabilities()) {
    nb::dict row;
    row["device"] = c.device;
    row["isa"] = c.isa;
    row["dtype"] = c.dtype;
    row["kv_dtype"] = c.kv_dtype;
    row["head_dim"] = nb::make_tuple(c.min_head_dim, c.max_head_dim);
    row["features"] = c.features;
    row["available"] = c.available;
    rows.append(row);
  }
  return rows;
}

}  // namespace

void bind_backend(nb::module_& m) {
  m.def("cpu_isa", &cpu_isa,
        "Instruction set of the CPU kernels in use: \"scalar\", \"avx2\", ...\n\n"
        "QUIRE_CPU_ISA forces one; ValueError if that one is unknown or unsupported here.\n\n"
        "Example::\n\n    >>> quire.cpu_isa() in quire.supported_cpu_isas()\n    True");
  m.def("supported_cpu_isas", &supported_cpu_isas,
        "Instruction sets that this CPU can run, best first.\n\n"
        "Example::\n\n    >>> quire.supported_cpu_isas()[-1]\n    'scalar'");
  m.def("num_threads", &num_threads,
        "Threads that CPU kernels run on, the caller's included.\n\n"
        "By default the CPUs that the process may use, or QUIRE_NUM_THREADS.\n\n"
        "Example::\n\n    >>> quire.num_threads() >= 1\n    True");
  def_named(m, "set_num_threads", &set_num_threads, nb::arg("count"),
            nb::sig("def set_num_threads(count: int) -> None"),
            "Sets the number of CPU threads; results do not change by a bit.\n\n"
            "Raises ValueError for count < 1.\n\n"
            "Example::\n\n    >>> quire.set_num_threads(2)");
  m.def("cuda_state", &cuda_state,
        "One sentence on CUDA: \"built without CUDA\", \"no driver\", ...\n\n"
        "Example::\n\n    >>> print(quire.cuda_state())");
  m.def(
      "multiply_add_rate",
      [](bool bfloat16_pairs) {
        nb::gil_scoped_release release;
        return multiply_add_rate(bfloat16_pairs);
      },
      nb::arg("bfloat16_pairs"));
  m.def(
      "read_rate",
      [](nb::handle data) {
        TensorArgs args;
        const TensorView view = args.input(data, "read_rate: data");
        QUIRE_CHECK_ARG(view.ndim == 1 && view.dtype == DType::kFloat32 && view.strides[0] == 1,
                        "read_rate: data: expected [count] float32, contiguous, got ",
                        describe(view));
        nb::gil_scoped_release release;
        return read_rate(view.as<float>(), static_cast<size_t>(view.shape[0]));
      },
      nb::arg("data"));
  m.def("capabilities", &capability_rows,
        "What works, a dict a row: device, isa, dtype, kv_dtype, head_dim (least, most), "
        "features, available (on this machine).\n\n"
        "Whatever a row lists works; what no row lists is refused with NotImplementedError.\n\n"
        "Example::\n\n    >>> any(row[\"available\"] for row in quire.capabilities())\n    True",
        nb::sig("def capabilities() -> list[dict[str, typing.Any]]"));
}

}  // namespace quire::python
