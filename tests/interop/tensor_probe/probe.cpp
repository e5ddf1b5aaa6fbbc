// SPDX-License-Identifier: Apache-2.0
// What the bindings make of a tensor, and how long six of them take.
#include <nanobind/stl/vector.h>

#include "quire/error.h"
#include "tensor.h"

namespace {

using quire::TensorView;
using quire::python::TensorArgs;

nb::dict inspect(nb::handle object, bool as_output) {
  TensorArgs args;
  const TensorView view =
      as_output ? args.output(object, "probe: tensor") : args.input(object, "probe: tensor");
  nb::dict d;
  d["address"] = reinterpret_cast<uintptr_t>(view.data);
  d["dtype"] = quire::name_of(view.dtype);
  d["device"] = to_string(view.device);
  d["shape"] = std::vector<int64_t>(view.shape.begin(), view.shape.begin() + view.ndim);
  d["strides"] = std::vector<int64_t>(view.strides.begin(), view.strides.begin() + view.ndim);
  d["read_only"] = view.read_only;
  return d;
}

void take_six(nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle) {}

void convert_six(nb::handle a, nb::handle b, nb::handle c, nb::handle d, nb::handle e,
                 nb::handle f) {
  TensorArgs args;
  const TensorView views[] = {args.input(a, "a"),  args.input(b, "b"),  args.input(c, "c"),
                              args.output(d, "d"), args.output(e, "e"), args.input(f, "f")};
  asm volatile("" ::"r"(views) : "memory");  // they are made, though nobody reads them
}

}  // namespace

NB_MODULE(quire_probe, m) {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const quire::InvalidArgument& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  m.def("inspect", &inspect, nb::arg("tensor").none(), nb::arg("as_output") = false);
  m.def("take_six", &take_six);
  m.def("convert_six", &convert_six);
#ifdef QUIRE_ABI_CHECKED
  m.attr("abi_checked") = true;
#else
  m.attr("abi_checked") = false;
#endif
}
