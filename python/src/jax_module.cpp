// SPDX-License-Identifier: Apache-2.0
// The module quire._jax: XLA FFI handlers, as capsules for jax.ffi.register_ffi_target. It is apart
// from _core so that _core needs no header of XLA and this module can be left out.
#include <nanobind/nanobind.h>

#include <exception>

#include "jax_call.h"
#include "quire/attention.h"
#include "quire/cache_ops.h"
#include "quire/error.h"

namespace nb = nanobind;

namespace quire::python {
namespace {

namespace ffi = xla::ffi;

AttentionOptions options_of(const JaxCall& call) {
  return {call.attribute<bool>("causal"), call.attribute<int32_t>("window_left"),
          call.attribute<int32_t>("window_right"), call.attribute<float>("scale"),
          call.attribute<float>("softcap")};
}

AttentionTensors tensors_of(const JaxCall& call, const char* k, const char* v) {
  AttentionTensors t;
  t.q = call.operand("q");
  t.k = call.operand(k);
  t.v = call.operand(v);
  t.out = call.result(0);
  t.lse = call.result(1);
  t.alibi_slopes = call.operand("alibi_slopes");
  t.sinks = call.operand("sinks");
  t.mask = call.operand("mask");
  t.mask_is_tree = call.attribute<bool>("mask_is_tree");
  return t;
}

void attention_once(JaxCall& call) {
  attention(tensors_of(call, "k", "v"), options_of(call), call.operand("cu_seqlens_q"),
            call.operand("cu_seqlens_k"));
}

void paged_attention_once(JaxCall& call) {
  paged_attention(tensors_of(call, "k_cache", "v_cache"), call.operand("block_table"),
                  call.operand("seq_lens"), options_of(call), call.operand("cu_seqlens_q"));
}

Rope rope_of(const JaxCall& call) {
  return {call.operand("rope.cos_sin"), call.operand("rope.positions"),
          call.attribute<bool>("interleaved")};
}

void append_kv_once(JaxCall& call) {
  const Rope rope = rope_of(call);
  append_kv(call.operand("k"), call.operand("v"), call.updated(0, "k_cache"),
            call.updated(1, "v_cache"), call.slots("slot_mapping"), rope.cos_sin ? &rope : nullptr);
}

void apply_rope_once(JaxCall& call) {
  apply_rope(call.operand("x"), rope_of(call), call.result(0));
}

void copy_blocks_once(JaxCall& call) {
  copy_blocks(call.updated(0, "k_cache"), call.updated(1, "v_cache"), call.operand("src_dst"));
}

void merge_states_once(JaxCall& call) {
  merge_states(call.operand("outs"), call.operand("lses"), call.result(0), call.result(1));
}

// Runs every instance; an exception becomes the call's error.
template <void (*Once)(JaxCall&)>
ffi::Error run(const char* function, ffi::RemainingArgs args, ffi::RemainingRets results,
               ffi::Dictionary attributes) {
  try {
    JaxCall call(function, args, results, attributes);
    for (int64_t i = 0; i < call.num_instances(); ++i) {
      call.select(i);
      Once(call);
    }
    return ffi::Error::Success();
  } catch (const InvalidArgument& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const Unsupported& error) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

#define QUIRE_JAX_HANDLER(name)                                                    \
  XLA_FFI_DEFINE_HANDLER(                                                          \
      name##_handler,                                                              \
      [](ffi::RemainingArgs a, ffi::RemainingRets r, ffi::Dictionary attributes) { \
        return run<name##_once>(#name, a, r, attributes);                          \
      },                                                                           \
      ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs())

QUIRE_JAX_HANDLER(attention);
QUIRE_JAX_HANDLER(paged_attention);
QUIRE_JAX_HANDLER(append_kv);
QUIRE_JAX_HANDLER(apply_rope);
QUIRE_JAX_HANDLER(copy_blocks);
QUIRE_JAX_HANDLER(merge_states);

}  // namespace

NB_MODULE(_jax, m) {
  m.doc() = "XLA FFI handlers of quire; use quire.integrations.jax.";
  m.def(
      "handlers",
      [] {
        nb::dict handlers;
        const auto add = [&](const char* name, XLA_FFI_Handler* handler) {
          handlers[name] = nb::capsule(reinterpret_cast<void*>(handler));
        };
        add("attention", attention_handler);
        add("paged_attention", paged_attention_handler);
        add("append_kv", append_kv_handler);
        add("apply_rope", apply_rope_handler);
        add("copy_blocks", copy_blocks_handler);
        add("merge_states", merge_states_handler);
        return handlers;
      },
      nb::sig("def handlers() -> dict[str, typing.Any]"), "A capsule for each operation, by name.");
}

}  // namespace quire::python
