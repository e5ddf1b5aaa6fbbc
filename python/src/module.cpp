// SPDX-License-Identifier: Apache-2.0
// The module quire._core: errors, and one bind function per topic.
#include "quire/error.h"
#include "tensor.h"

NB_MODULE(_core, m) {
  m.doc() = "Bindings of the quire runtime; use the package `quire`.";
  nb::set_leak_warnings(false);  // a plan in a global variable at exit is no bug of its owner
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const quire::InvalidArgument& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const quire::Unsupported& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    } catch (const quire::InvariantError& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
  });
  quire::python::bind_backend(m);
  quire::python::bind_attention(m);
  quire::python::bind_backward(m);
  quire::python::bind_kv_cache(m);
  quire::python::bind_chain_key(m);
  quire::python::bind_block_ranges(m);
  quire::python::bind_kv_store(m);
  quire::python::bind_call_log(m);
}
