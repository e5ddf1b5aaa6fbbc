// SPDX-License-Identifier: Apache-2.0
// Attention and the cache operations. Python's defaults and docstrings of the one-shot functions
// are in quire/_ops.py, which also makes the outputs.
#include "quire/attention.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include "attention_plan.h"
#include "named.h"
#include "quire/cache_ops.h"
#include "quire/error.h"
#include "stream.h"
#include "tensor.h"

namespace quire::python {
namespace {

using Window = std::pair<int, int>;

DType parse_dtype(const std::string& name) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3})
    if (name == name_of(dtype)) return dtype;
  throw InvalidArgument(
      concat("Attention: dtype: expected \"float32\", \"float16\", \"bfloat16\" or "
             "\"float8_e4m3\", got \"",
             name, "\""));
}

DType parse_kv_dtype(const std::string& name, DType dtype) {
  for (DType kv : {dtype, DType::kFloat8E4M3, DType::kFloat8E5M2, DType::kInt8})
    if (name == name_of(kv)) return kv;
  throw InvalidArgument(concat("Attention: kv_dtype: expected None, \"", name_of(dtype),
                               "\" (dtype), \"float8_e4m3\", \"float8_e5m2\" or \"int8\", got \"",
                               name, "\""));
}

Device parse_device(const std::string& name) {
  if (name == "cpu") return {};
  if (name == "cuda") return {DeviceType::kCUDA, 0};
  if (name.rfind("cuda:", 0) == 0 && name.size() > 5 &&
      name.find_first_not_of("0123456789", 5) == std::string::npos && name.size() < 9)
    return {DeviceType::kCUDA, std::stoi(name.substr(5))};
  throw InvalidArgument(
      concat("Attention: device: expected \"cpu\" or \"cuda[:index]\", got \"", name, "\""));
}

// A scale that is not given is 0 in C++; a given 0 would silently mean something else.
float parse_scale(std::optional<float> scale) {
  QUIRE_CHECK_ARG(!scale || *scale != 0, "attention: scale: expected a number other than 0, got 0");
  return scale.value_or(0.0f);
}

AttentionTensors layer_tensors(TensorArgs& args, nb::handle q, nb::handle k_cache,
                               nb::handle v_cache, nb::handle out, nb::handle lse, nb::handle sinks,
                               nb::handle alibi_slopes, nb::handle k_scale, nb::handle v_scale,
                               float (&numbers)[2]) {
  AttentionTensors t;
  t.q = args.input(q, "paged_attention: q");
  t.k = args.input(k_cache, "paged_attention: k_cache");
  t.v = args.input(v_cache, "paged_attention: v_cache");
  t.scales.k = args.scale(k_scale, "paged_attention: k_scale", numbers[0]);
  t.scales.v = args.scale(v_scale, "paged_attention: v_scale", numbers[1]);
  t.out = args.output(out, "paged_attention: out");
  t.lse = args.optional_output(lse, "paged_attention: lse");
  t.sinks = args.optional_input(sinks, "paged_attention: sinks");
  t.alibi_slopes = args.optional_input(alibi_slopes, "paged_attention: alibi_slopes");
  return t;
}

// Returns `out`, made in q's framework where the caller gave none.
nb::object run_attention(const Attention& attention, const AttentionPlan& plan, nb::handle q,
                         nb::handle k_cache, nb::handle v_cache, nb::object out, nb::handle lse,
                         nb::handle sinks, nb::handle alibi_slopes, nb::handle k_scale,
                         nb::handle v_scale, nb::handle stream) {
  TensorArgs args;
  float numbers[2];
  if (out.is_none())
    out = nb::module_::import_("quire._arrays").attr("empty_out")(q, attention.desc().head_dim_v);
  AttentionTensors t = layer_tensors(args, q, k_cache, v_cache, out, lse, sinks, alibi_slopes,
                                     k_scale, v_scale, numbers);
  t.stream = stream_of(stream, q, t.q.device, "paged_attention");
  {
    nb::gil_scoped_release release;
    attention.run(plan, t);
  }
  return out;
}

void run_part(const Attention& attention, const AttentionPlan& plan, int ith, int nth, nb::handle q,
              nb::handle k_cache, nb::handle v_cache, nb::handle out, nb::handle workspace,
              nb::handle lse, nb::handle sinks, nb::handle alibi_slopes, nb::handle k_scale,
              nb::handle v_scale) {
  TensorArgs args;
  float numbers[2];
  const AttentionTensors t = layer_tensors(args, q, k_cache, v_cache, out, lse, sinks, alibi_slopes,
                                           k_scale, v_scale, numbers);
  const TensorView memory = args.output(workspace, "run_part: workspace");
  QUIRE_CHECK_ARG(memory.dtype == DType::kUInt8 && memory.ndim == 1 &&
                      (memory.shape[0] <= 1 || memory.strides[0] == 1) &&
                      memory.device.type == DeviceType::kCPU,
                  "run_part: workspace: expected [workspace_size(plan)] uint8, contiguous, on the "
                  "CPU, got ",
                  describe(memory));
  nb::gil_scoped_release release;
  attention.run_part(plan, t, {memory.as<std::byte>(), static_cast<size_t>(memory.shape[0])}, ith,
                     nth);
}

void bind_plan_once_run_often(nb::module_& m) {
  nb::class_<Attention>(
      m, "Attention",
      "Attention of one model over a paged cache: plan once a step, run once a layer.\n\n"
      "Picks the kernel when built. `window` is (left, right), inclusive, -1 = open; `scale` None\n"
      "is 1/sqrt(head_dim); `softcap` 0 is none; `kv_dtype` None is `dtype`, else "
      "\"float8_e4m3\",\n"
      "\"float8_e5m2\" or \"int8\" for a quantised cache. `dtype` \"float8_e4m3\" is for queries "
      "of\n"
      "codes over a cache of such: see paged_attention(). `head_dim_v`, the width of values, None\n"
      "is head_dim: 512 for latent caches (MLA) of 576, v_cache = k_cache[..., :512]. "
      "Thread-safe.\n"
      "\n"
      "Raises ValueError for a wrong argument, NotImplementedError (with the text of explain())\n"
      "where no kernel fits.\n\n"
      "Example::\n\n"
      "    attn = quire.Attention(num_heads=32, num_kv_heads=8, head_dim=128, dtype=\"float32\")\n"
      "    plan = attn.plan(block_table, seq_lens)          # once a step\n"
      "    attn.run(plan, q, k_cache, v_cache, out=out)     # once a layer")
      .def(named("__init__",
                 [](Attention* self, int num_heads, int num_kv_heads, int head_dim,
                    const std::string& dtype, const std::optional<std::string>& kv_dtype,
                    int block_size, bool causal, Window window, float softcap,
                    std::optional<float> scale, const std::string& device,
                    std::optional<int> head_dim_v) {
                   AttentionDesc desc;
                   desc.num_heads = num_heads;
                   desc.num_kv_heads = num_kv_heads;
                   desc.head_dim = head_dim;
                   QUIRE_CHECK_ARG(
                       !head_dim_v || *head_dim_v >= 1,
                       "Attention: head_dim_v: expected None (head_dim) or at least 1, got ",
                       *head_dim_v);
                   desc.head_dim_v = head_dim_v.value_or(0);
                   desc.dtype = parse_dtype(dtype);
                   desc.kv_dtype = kv_dtype ? parse_kv_dtype(*kv_dtype, desc.dtype) : desc.dtype;
                   QUIRE_CHECK_ARG(block_size >= 1,
                                   "Attention: block_size: expected at least 1, got ", block_size);
                   desc.block_size = block_size;
                   desc.causal = causal;
                   std::tie(desc.window_left, desc.window_right) = window;
                   desc.softcap = softcap;
                   desc.scale = parse_scale(scale);
                   new (self) Attention(desc, parse_device(device));
                 }),
           nb::kw_only(), nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
           nb::arg("dtype") = "bfloat16", nb::arg("kv_dtype") = nb::none(),
           nb::arg("block_size") = 16, nb::arg("causal") = true, nb::arg("window") = Window(-1, -1),
           nb::arg("softcap") = 0.0f, nb::arg("scale") = nb::none(), nb::arg("device") = "cpu",
           nb::arg("head_dim_v") = nb::none(),
           nb::sig(
               "def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str "
               "= 'bfloat16', kv_dtype: str | None = None, block_size: int = 16, causal: bool = "
               "True, window: tuple[int, int] = (-1, -1), softcap: float = 0.0, scale: float | "
               "None = None, device: str = 'cpu', head_dim_v: int | None = None) -> None"))
      .def(named("plan", &make_plan), nb::arg("block_table"), nb::arg("seq_lens"),
           nb::arg("cu_seqlens_q") = nb::none(), nb::arg("max_total_q") = nb::none(),
           nb::arg("stream") = nb::none(),
           nb::sig("def plan(self, block_table: object, seq_lens: object, cu_seqlens_q: object | "
                   "None = None, max_total_q: int | None = None, stream: object | None = None) -> "
                   "AttentionPlan"),
           nb::keep_alive<0, 2>(), nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>(),
           kPlanDoc)  // a GPU reads them later
      .def(
          named("run", &run_attention), nb::arg("plan"), nb::arg("q"), nb::arg("k_cache"),
          nb::arg("v_cache"), nb::arg("out") = nb::none(), nb::arg("lse") = nb::none(),
          nb::arg("sinks") = nb::none(), nb::arg("alibi_slopes") = nb::none(),
          nb::arg("k_scale").none() = 1.0, nb::arg("v_scale").none() = 1.0,
          nb::arg("stream") = nb::none(),
          nb::sig("def run(self, plan: AttentionPlan, q: object, k_cache: object, v_cache: object, "
                  "out: object | None = None, lse: object | None = None, sinks: object | None = "
                  "None, alibi_slopes: object | None = None, k_scale: object | None = 1.0, "
                  "v_scale: object | None = 1.0, stream: object | None = None) -> object"),
          "Runs a plan on one layer's tensors and returns out.\n\n"
          "q [total_q, num_heads, head_dim], of dtype; out likewise, head_dim_v wide, but "
          "bfloat16\n"
          "where that is float8_e4m3; k_cache [num_blocks, block_size, num_kv_heads, head_dim],\n"
          "v_cache likewise, head_dim_v wide, any strides with the last dimension contiguous; lse\n"
          "float32 [num_heads, total_q], written if given; sinks, alibi_slopes float32 "
          "[num_heads];\n"
          "k_scale, v_scale of a quantised cache, as for paged_attention().\n\n"
          "Raises ValueError, before any work, naming the wrong tensor.\n\n"
          "Example::\n\n    attn.run(plan, q, cache.k(layer), cache.v(layer), out=out)")
      .def(
          named("run_part", &run_part), nb::arg("plan"), nb::arg("ith"), nb::arg("nth"),
          nb::arg("q"), nb::arg("k_cache"), nb::arg("v_cache"), nb::arg("out"),
          nb::arg("workspace"), nb::arg("lse") = nb::none(), nb::arg("sinks") = nb::none(),
          nb::arg("alibi_slopes") = nb::none(), nb::arg("k_scale") = 1.0, nb::arg("v_scale") = 1.0,
          nb::sig("def run_part(self, plan: AttentionPlan, ith: int, nth: int, q: object, k_cache: "
                  "object, v_cache: object, out: object, workspace: object, lse: object | None = "
                  "None, sinks: object | None = None, alibi_slopes: object | None = None, k_scale: "
                  "object = 1.0, v_scale: object = 1.0) -> None"),
          "Runs one of nth parts of what run() does, for hosts with threads of their own.\n\n"
          "All parts, ith = 0 ... nth - 1, are to be called with the same arguments, in any order\n"
          "and from any threads; when all have returned, out has the bits that run() gives. No\n"
          "part waits for another, and none uses quire's threads. workspace uint8\n"
          "[workspace_size(plan)], zeros before its first use, is left ready for the next run of\n"
          "this or another plan that it is large enough for; one run at a time. CPU only.\n\n"
          "Raises ValueError, before any work, naming the wrong argument.\n\n"
          "Example::\n\n"
          "    workspace = numpy.zeros(attn.workspace_size(plan), numpy.uint8)\n"
          "    for i in range(n):  # or on n threads\n"
          "        attn.run_part(plan, i, n, q, k_cache, v_cache, out, workspace)")
      .def(named("workspace_size",
                 [](const Attention& self, const AttentionPlan& plan) {
                   return self.workspace_size(plan);
                 }),
           nb::arg("plan"), nb::sig("def workspace_size(self, plan: AttentionPlan) -> int"),
           "Bytes of scratch memory that run() uses for this plan, and run_part() asks for.\n\n"
           "Example::\n\n    attn.workspace_size(plan)")
      .def("explain", &Attention::explain,
           "The candidate kernels, a line each: the chosen one, and why each other one lost.\n\n"
           "Example::\n\n    print(attn.explain())");
}

AttentionOptions make_options(bool causal, Window window, std::optional<float> scale,
                              float softcap) {
  return {causal, window.first, window.second, parse_scale(scale), softcap};
}

void one_shot_attention(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                        bool causal, Window window, std::optional<float> scale, float softcap,
                        nb::handle alibi_slopes, nb::handle sinks, nb::handle mask,
                        bool mask_is_tree, nb::handle cu_seqlens_q, nb::handle cu_seqlens_k,
                        nb::handle stream) {
  TensorArgs args;
  AttentionTensors t;
  t.q = args.input(q, "attention: q");
  t.k = args.input(k, "attention: k");
  t.v = args.input(v, "attention: v");
  t.out = args.output(out, "attention: out");
  t.lse = args.optional_output(lse, "attention: lse");
  t.alibi_slopes = args.optional_input(alibi_slopes, "attention: alibi_slopes");
  t.sinks = args.optional_input(sinks, "attention: sinks");
  t.mask = args.optional_input(mask, "attention: mask");
  t.mask_is_tree = mask_is_tree;
  const TensorView cu_q = args.optional_input(cu_seqlens_q, "attention: cu_seqlens_q");
  const TensorView cu_k = args.optional_input(cu_seqlens_k, "attention: cu_seqlens_k");
  const AttentionOptions options = make_options(causal, window, scale, softcap);
  t.stream = stream_of(stream, q, t.q.device, "attention");
  nb::gil_scoped_release release;
  attention(t, options, cu_q, cu_k);
}

void one_shot_paged_attention(nb::handle q, nb::handle k_cache, nb::handle v_cache,
                              nb::handle block_table, nb::handle seq_lens, nb::handle out,
                              nb::handle lse, nb::handle cu_seqlens_q, bool causal, Window window,
                              std::optional<float> scale, float softcap, nb::handle alibi_slopes,
                              nb::handle sinks, nb::handle mask, bool mask_is_tree,
                              nb::handle k_scale, nb::handle v_scale, nb::handle stream) {
  TensorArgs args;
  AttentionTensors t;
  float numbers[2];
  t.scales.k = args.scale(k_scale, "paged_attention: k_scale", numbers[0]);
  t.scales.v = args.scale(v_scale, "paged_attention: v_scale", numbers[1]);
  t.q = args.input(q, "paged_attention: q");
  t.k = args.input(k_cache, "paged_attention: k_cache");
  t.v = args.input(v_cache, "paged_attention: v_cache");
  t.out = args.output(out, "paged_attention: out");
  t.lse = args.optional_output(lse, "paged_attention: lse");
  t.alibi_slopes = args.optional_input(alibi_slopes, "paged_attention: alibi_slopes");
  t.sinks = args.optional_input(sinks, "paged_attention: sinks");
  t.mask = args.optional_input(mask, "paged_attention: mask");
  t.mask_is_tree = mask_is_tree;
  const TensorView table = args.input(block_table, "paged_attention: block_table");
  const TensorView lengths = args.input(seq_lens, "paged_attention: seq_lens");
  const TensorView cu_q = args.optional_input(cu_seqlens_q, "paged_attention: cu_seqlens_q");
  const AttentionOptions options = make_options(causal, window, scale, softcap);
  t.stream = stream_of(stream, q, t.q.device, "paged_attention");
  nb::gil_scoped_release release;
  paged_attention(t, table, lengths, options, cu_q);
}

// A quire.Rope, with the names of its arrays in error messages.
Rope read_rope(TensorArgs& args, nb::handle rope, const char* cos_sin, const char* positions) {
  return {args.input(rope.attr("cos_sin"), cos_sin), args.input(rope.attr("positions"), positions),
          nb::cast<bool>(rope.attr("interleaved"))};
}

}  // namespace

// Tensors may be None as far as nanobind is concerned: ours is the error that names them.
void bind_attention(nb::module_& m) {
  bind_attention_plan(m);
  bind_plan_once_run_often(m);
  m.def("attention", &one_shot_attention, nb::arg("q").none(), nb::arg("k").none(),
        nb::arg("v").none(), nb::arg("out").none(), nb::arg("lse").none(), nb::arg("causal"),
        nb::arg("window"), nb::arg("scale").none(), nb::arg("softcap"),
        nb::arg("alibi_slopes").none(), nb::arg("sinks").none(), nb::arg("mask").none(),
        nb::arg("mask_is_tree"), nb::arg("cu_seqlens_q").none(), nb::arg("cu_seqlens_k").none(),
        nb::arg("stream") = nb::none());
  m.def("paged_attention", &one_shot_paged_attention, nb::arg("q").none(),
        nb::arg("k_cache").none(), nb::arg("v_cache").none(), nb::arg("block_table").none(),
        nb::arg("seq_lens").none(), nb::arg("out").none(), nb::arg("lse").none(),
        nb::arg("cu_seqlens_q").none(), nb::arg("causal"), nb::arg("window"),
        nb::arg("scale").none(), nb::arg("softcap"), nb::arg("alibi_slopes").none(),
        nb::arg("sinks").none(), nb::arg("mask").none(), nb::arg("mask_is_tree"),
        nb::arg("k_scale").none(), nb::arg("v_scale").none(), nb::arg("stream") = nb::none());
  m.def(
      "append_kv",
      [](nb::handle k, nb::handle v, nb::handle k_cache, nb::handle v_cache, nb::handle slots,
         nb::handle rope, nb::handle k_scale, nb::handle v_scale, nb::handle stream) {
        TensorArgs args;
        float numbers[2];
        const TensorView k_view = args.input(k, "append_kv: k");
        const TensorView v_view = args.input(v, "append_kv: v");
        const TensorView k_cache_view = args.output(k_cache, "append_kv: k_cache");
        const TensorView v_cache_view = args.output(v_cache, "append_kv: v_cache");
        const TensorView slot_view = args.input(slots, "append_kv: slot_mapping");
        std::optional<Rope> turn;
        if (!rope.is_none())
          turn = read_rope(args, rope, "append_kv: rope.cos_sin", "append_kv: rope.positions");
        const KvScales scales = {args.scale(k_scale, "append_kv: k_scale", numbers[0]),
                                 args.scale(v_scale, "append_kv: v_scale", numbers[1])};
        void* handle = stream_of(stream, k_cache, k_cache_view.device, "append_kv");
        nb::gil_scoped_release release;
        append_kv(k_view, v_view, k_cache_view, v_cache_view, slot_view, turn ? &*turn : nullptr,
                  scales, handle);
      },
      nb::arg("k").none(), nb::arg("v").none(), nb::arg("k_cache").none(),
      nb::arg("v_cache").none(), nb::arg("slot_mapping").none(), nb::arg("rope").none(),
      nb::arg("k_scale").none(), nb::arg("v_scale").none(), nb::arg("stream") = nb::none());
  m.def(
      "apply_rope",
      [](nb::handle x, nb::handle rope, nb::handle out) {
        TensorArgs args;
        const TensorView x_view = args.input(x, "apply_rope: x");
        const Rope turn =
            read_rope(args, rope, "apply_rope: rope.cos_sin", "apply_rope: rope.positions");
        const TensorView out_view = args.output(out, "apply_rope: out");
        void* stream = stream_of(nb::none(), x, x_view.device, "apply_rope");
        nb::gil_scoped_release release;
        apply_rope(x_view, turn, out_view, stream);
      },
      nb::arg("x").none(), nb::arg("rope").none(), nb::arg("out").none());
  m.def(
      "copy_blocks",
      [](nb::handle k_cache, nb::handle v_cache, nb::handle src_dst) {
        TensorArgs args;
        const TensorView k_view = args.output(k_cache, "copy_blocks: k_cache");
        const TensorView v_view = args.output(v_cache, "copy_blocks: v_cache");
        const TensorView pairs = args.input(src_dst, "copy_blocks: src_dst");
        void* stream = stream_of(nb::none(), k_cache, k_view.device, "copy_blocks");
        nb::gil_scoped_release release;
        copy_blocks(k_view, v_view, pairs, stream);
      },
      nb::arg("k_cache").none(), nb::arg("v_cache").none(), nb::arg("src_dst").none());
  m.def(
      "swap_blocks",
      [](nb::handle src, nb::handle dst, nb::handle src_dst) {
        TensorArgs args;
        const TensorView src_view = args.input(src, "swap_blocks: src");
        const TensorView dst_view = args.output(dst, "swap_blocks: dst");
        const TensorView pairs = args.input(src_dst, "swap_blocks: src_dst");
        const bool is_from_host = src_view.device.type == DeviceType::kCPU;
        void* stream = stream_of(nb::none(), is_from_host ? dst : src,
                                 is_from_host ? dst_view.device : src_view.device, "swap_blocks");
        nb::gil_scoped_release release;
        swap_blocks(src_view, dst_view, pairs, stream);
      },
      nb::arg("src").none(), nb::arg("dst").none(), nb::arg("src_dst").none());
  m.def(
      "merge_states",
      [](nb::handle outs, nb::handle lses, nb::handle out, nb::handle lse) {
        TensorArgs args;
        const TensorView outs_view = args.input(outs, "merge_states: outs");
        const TensorView lses_view = args.input(lses, "merge_states: lses");
        const TensorView out_view = args.output(out, "merge_states: out");
        const TensorView lse_view = args.output(lse, "merge_states: lse");
        void* stream = stream_of(nb::none(), outs, outs_view.device, "merge_states");
        nb::gil_scoped_release release;
        merge_states(outs_view, lses_view, out_view, lse_view, stream);
      },
      nb::arg("outs").none(), nb::arg("lses").none(), nb::arg("out").none(), nb::arg("lse").none());
}

}  // namespace quire::python
