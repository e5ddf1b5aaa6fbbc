// SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/optional.h>

#include "attention_plan.h"
#include "quire/error.h"
#include "stream.h"
#include "tensor.h"

namespace quire::python {
namespace {

const int32_t* device_lengths(TensorArgs& args, nb::handle object, const char* name, int64_t size,
                              Device device) {
  const TensorView view = args.input(object, name);
  QUIRE_CHECK_ARG(view.ndim == 1 && view.dtype == DType::kInt32 && view.shape[0] == size &&
                      (size <= 1 || view.strides[0] == 1) && view.device == device,
                  name, ": expected [", size, "] int32, contiguous, on ", to_string(device),
                  " like block_table, got ", describe(view));
  return view.as<int32_t>();
}

// Of arrays that only the GPU reads.
AttentionPlan plan_on_device(const Attention& attention, TensorArgs& args, const TensorView& table,
                             nb::handle block_table, nb::handle seq_lens, nb::handle cu_seqlens_q,
                             std::optional<int> max_total_q, nb::handle stream) {
  QUIRE_CHECK_ARG(
      table.ndim == 2 && table.dtype == DType::kInt32 && table.device == attention.device() &&
          (table.is_empty() || table.shape[1] <= 1 || table.strides[1] == 1),
      "plan: block_table: expected [batch, max_blocks] int32 with contiguous rows on the "
      "CPU or ",
      to_string(attention.device()), ", got ", describe(table));
  QUIRE_CHECK_ARG(max_total_q.has_value() != cu_seqlens_q.is_none(),
                  "plan: max_total_q: expected with cu_seqlens_q on a GPU, and only then");
  const int64_t n = table.shape[0];
  AttentionBatch batch;
  batch.batch_size = static_cast<int>(n);
  batch.seq_lens = device_lengths(args, seq_lens, "plan: seq_lens", n, table.device);
  if (!cu_seqlens_q.is_none())
    batch.cu_seqlens_q =
        device_lengths(args, cu_seqlens_q, "plan: cu_seqlens_q", n + 1, table.device);
  batch.block_table = table.as<int32_t>();
  batch.block_table_stride = table.strides[0];
  batch.max_blocks = static_cast<int>(table.shape[1]);
  void* handle = stream_of(stream, block_table, table.device, "plan");
  nb::gil_scoped_release release;
  return attention.plan_on_device(batch, max_total_q.value_or(batch.batch_size), handle);
}

}  // namespace

AttentionPlan make_plan(const Attention& attention, nb::handle block_table, nb::handle seq_lens,
                        nb::handle cu_seqlens_q, std::optional<int> max_total_q,
                        nb::handle stream) {
  TensorArgs args;
  const TensorView table = args.input(block_table, "plan: block_table");
  QUIRE_CHECK_ARG(attention.desc().block_size > 0, "plan: expected an Attention with a block_size");
  if (table.device.type != DeviceType::kCPU)
    return plan_on_device(attention, args, table, block_table, seq_lens, cu_seqlens_q, max_total_q,
                          stream);
  QUIRE_CHECK_ARG(!max_total_q && stream.is_none(),
                  "plan: max_total_q, stream: expected only with a block_table on a GPU");
  const Int32Arg lengths(seq_lens, "plan: seq_lens");
  QUIRE_CHECK_ARG(table.ndim == 2 && table.dtype == DType::kInt32 &&
                      table.device.type == DeviceType::kCPU &&
                      table.shape[0] == static_cast<int64_t>(lengths.size()) &&
                      (table.is_empty() || table.shape[1] <= 1 || table.strides[1] == 1),
                  "plan: block_table: expected [", lengths.size(),
                  ", max_blocks] int32 on the CPU with contiguous rows, got ", describe(table));
  AttentionBatch batch;
  batch.batch_size = static_cast<int>(lengths.size());
  batch.seq_lens = lengths.data();
  batch.block_table = table.as<int32_t>();
  batch.block_table_stride = table.strides[0];
  batch.max_blocks = static_cast<int>(table.shape[1]);
  std::optional<Int32Arg> cu;
  if (!cu_seqlens_q.is_none()) {
    cu.emplace(cu_seqlens_q, "plan: cu_seqlens_q");
    QUIRE_CHECK_ARG(cu->size() == lengths.size() + 1, "plan: cu_seqlens_q: expected [",
                    lengths.size() + 1, "] int32, got [", cu->size(), "]");
    batch.cu_seqlens_q = cu->data();
  }
  nb::gil_scoped_release release;
  return attention.plan(batch);
}

const char* const kPlanDoc =
    "Plans one step of a batch.\n\n"
    "block_table int32 [batch, max_blocks], seq_lens int32 [batch] (the new tokens\n"
    "included), cu_seqlens_q int32 [batch + 1] or None for one query row each. The plan\n"
    "copies what it needs: the arrays may change afterwards. An Attention that differs in\n"
    "scale or softcap alone runs it, too.\n\n"
    "Arrays on the GPU are planned there, when `stream` comes to it, and not copied: the\n"
    "plan runs on that stream, and inside a CUDA graph together with its runs serves every\n"
    "batch up to this one: write other lengths and blocks into the arrays, seq_lens 0 for\n"
    "sequences that are not there, and replay. The plan keeps the arrays alive. With\n"
    "cu_seqlens_q max_total_q is then the rows of q and out; rows of no sequence are not\n"
    "written. Nothing is checked: lengths out of range count as the nearest that is not.\n\n"
    "Raises ValueError for lengths or used table entries that make no sense.\n\n"
    "Example::\n\n    plan = attn.plan(batch.block_table, batch.seq_lens, "
    "batch.cu_seqlens_q)";

void bind_attention_plan(nb::module_& m) {
  nb::class_<AttentionPlan>(m, "AttentionPlan",
                            "One step's list of work, made by Attention.plan(). Immutable: it "
                            "serves every layer of the step, from any thread.\n\n"
                            "Its figures are 0 where the GPU has made it: only the GPU knows them.")
      .def_prop_ro(
          "num_work_items", [](const AttentionPlan& p) { return p.items.size(); },
          "Work items: some rows of a sequence, for one kv head, against a range of its keys.")
      .def_prop_ro(
          "num_shared_items", [](const AttentionPlan& p) { return p.num_shared_items; },
          "Those whose keys are read once for several sequences: blocks that begin the block\n"
          "tables of all of them. The result is the same, bit by bit.")
      .def_prop_ro(
          "flops", [](const AttentionPlan& p) { return p.flops; },
          "Floating-point operations of one layer: q.k and p.v over all visible pairs.")
      .def_prop_ro(
          "kv_bytes", [](const AttentionPlan& p) { return p.kv_bytes; },
          "Bytes of K and V that one layer reads, counted once a sequence and kv head.");
}

}  // namespace quire::python
