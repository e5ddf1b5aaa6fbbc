// SPDX-License-Identifier: Apache-2.0
// The gradients of attention. Python's defaults and docstring are in quire/_backward.py, which also
// makes the outputs.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include "quire/attention_backward.h"
#include "quire/error.h"
#include "tensor.h"

namespace quire::python {
namespace {

TensorView optional_output(TensorArgs& args, nb::handle object, const char* name) {
  return object.is_none() ? TensorView() : args.output(object, name);
}

void attention_gradients(nb::handle dout, nb::handle q, nb::handle k, nb::handle v, nb::handle out,
                         nb::handle lse, nb::handle dq, nb::handle dk, nb::handle dv,
                         nb::handle dsinks, bool causal, std::pair<int, int> window,
                         std::optional<float> scale, float softcap, nb::handle alibi_slopes,
                         nb::handle sinks, nb::handle mask, bool mask_is_tree,
                         nb::handle cu_seqlens_q, nb::handle cu_seqlens_k) {
  QUIRE_CHECK_ARG(!scale || *scale != 0,
                  "attention_backward: scale: expected a number other than 0, got 0");
  TensorArgs args;
  AttentionGradients g;
  g.dout = args.input(dout, "attention_backward: dout");
  g.dq = args.output(dq, "attention_backward: dq");
  g.dk = args.output(dk, "attention_backward: dk");
  g.dv = args.output(dv, "attention_backward: dv");
  g.dsinks = optional_output(args, dsinks, "attention_backward: dsinks");
  AttentionTensors t;
  t.q = args.input(q, "attention_backward: q");
  t.k = args.input(k, "attention_backward: k");
  t.v = args.input(v, "attention_backward: v");
  t.out = args.input(out, "attention_backward: out");
  t.lse = args.input(lse, "attention_backward: lse");
  t.alibi_slopes = args.optional_input(alibi_slopes, "attention_backward: alibi_slopes");
  t.sinks = args.optional_input(sinks, "attention_backward: sinks");
  t.mask = args.optional_input(mask, "attention_backward: mask");
  t.mask_is_tree = mask_is_tree;
  const TensorView cu_q = args.optional_input(cu_seqlens_q, "attention_backward: cu_seqlens_q");
  const TensorView cu_k = args.optional_input(cu_seqlens_k, "attention_backward: cu_seqlens_k");
  AttentionOptions options;
  options.causal = causal;
  std::tie(options.window_left, options.window_right) = window;
  options.scale = scale.value_or(0.0f);
  options.softcap = softcap;
  nb::gil_scoped_release release;
  attention_backward(t, g, options, cu_q, cu_k);
}

}  // namespace

void bind_backward(nb::module_& m) {
  m.def("attention_backward", &attention_gradients, nb::arg("dout").none(), nb::arg("q").none(),
        nb::arg("k").none(), nb::arg("v").none(), nb::arg("out").none(), nb::arg("lse").none(),
        nb::arg("dq"), nb::arg("dk"), nb::arg("dv"), nb::arg("dsinks").none(), nb::arg("causal"),
        nb::arg("window"), nb::arg("scale").none(), nb::arg("softcap"),
        nb::arg("alibi_slopes").none(), nb::arg("sinks").none(), nb::arg("mask").none(),
        nb::arg("mask_is_tree"), nb::arg("cu_seqlens_q").none(), nb::arg("cu_seqlens_k").none());
}

}  // namespace quire::python
