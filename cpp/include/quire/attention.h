// SPDX-License-Identifier: Apache-2.0
// Attention in three lifetimes: AttentionDesc per model, AttentionPlan per step, run() per layer.
//
//   Attention attention(desc);                              // picks the kernel once
//   AttentionPlan plan = attention.plan(batch);             // immutable, serves every layer
//   for (auto& layer : layers) attention.run(plan, {.q = ..., .k = ..., .v = ..., .out = ...});
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "quire/device.h"
#include "quire/dtype.h"
#include "quire/kernel_params.h"
#include "quire/kv_scales.h"
#include "quire/tensor.h"

namespace quire {

class Backend;

// What stays the same for all steps of a model's attention layers.
struct AttentionDesc {
  int num_heads = 0;
  int num_kv_heads = 0;  // divides num_heads
  int head_dim = 0;
  int head_dim_v = 0;                 // 0: head_dim
  DType dtype = DType::kBFloat16;     // of q and out; float8_e4m3, as kv_dtype: out is bfloat16
  DType kv_dtype = DType::kBFloat16;  // dtype, or paged: float8_e4m3, float8_e5m2, int8
  int block_size = 0;  // tokens a block of the paged cache; 0: k and v are ragged or dense
  bool causal = true;  // aligned bottom right
  int window_left = -1;
  int window_right = -1;  // inclusive, -1: open
  float scale = 0;        // 0: 1 / sqrt(head_dim)
  float softcap = 0;      // 0: none

  // Columns of v and out.
  int value_dim() const { return head_dim_v ? head_dim_v : head_dim; }
};

// One step's batch. The pointers are read by plan() only.
//   paged:  block_table, seq_lens, and cu_seqlens_q or null (one query row each)
//   ragged: cu_seqlens_q and cu_seqlens_k
//   dense:  dense_q and dense_k
struct AttentionBatch {
  int batch_size = 0;
  const int32_t* seq_lens = nullptr;      // [batch]: keys of each sequence, the new tokens included
  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1]: where the query rows of each begin
  const int32_t* cu_seqlens_k = nullptr;  // [batch + 1]: where the keys of each begin
  const int32_t* block_table = nullptr;   // [batch, max_blocks]; before the window anything
  int64_t block_table_stride = 0;
  int max_blocks = 0;
  int dense_q = -1;  // query rows and keys of every sequence
  int dense_k = -1;
};

// Whether sequences whose block tables begin with the same blocks read those keys together. No bit
// of a result depends on it.
enum class Sharing { kNever, kWherePays, kAlways };

// How finely the backend likes its work cut.
struct PlanTraits {
  int parallelism = 1;                // workers that share the list
  int max_rows = 64;                  // query rows x heads of a kv head in one work item
  Sharing sharing = Sharing::kNever;  // else the backend is to run units, not items
};

// Items [begin, end) of a plan: what a worker runs at once. Where there are several, they have one
// range of keys, and either are the same rows for several kv heads, or of one kv head and of
// sequences that share the blocks of that range: whole chunks that all of their rows see.
struct WorkUnit {
  int32_t begin, end;
};

// A step's list of work. Immutable; shared by layers and threads.
struct AttentionPlan {
  // Of the Attention that made it. Others run it, too, if only their scale and softcap differ.
  AttentionDesc desc;
  Device device;
  std::vector<Sequence> sequences;
  std::vector<WorkItem> items;  // longest first
  std::vector<WorkUnit> units;  // cover the items in order
  std::vector<MergeItem> merges;
  int num_partials = 0;      // slots of the workspace, each of partial_rows rows
  int partial_rows = 0;      // with kNever: most rows of an item that is split, else those of one
                             // query; a chunk of an item takes as many slots as its rows need
  int num_shared_items = 0;  // whose keys are read once for several sequences
  int64_t total_q = 0;       // rows that q must have (dense: rows of each sequence)
  int64_t total_k = 0;       // rows that k and v must have (dense: of each sequence; paged: 0)
  bool made_on_device = false;  // then the lists are there alone: here they are empty, and total_k
                                // is the most keys of a sequence
  bool dense = false;
  std::vector<int32_t> block_ids;  // paged: the used entries of all rows of the block table
  int32_t max_block_id = -1;       // largest block id in use: the cache must be larger
  int64_t flops = 0;               // of q.k and p.v over the visible pairs of query and key
  int64_t kv_bytes = 0;            // of the visible K and V, counted once a sequence and kv head
  // What the backend keeps with the plan: on a GPU the lists in its memory. There the plan must
  // outlive graphs captured from it, and the streams it runs on must outlive the plan.
  std::shared_ptr<void> on_device;
};

// One layer's tensors; see kernel_params.h for the shapes. An empty view: not given.
struct AttentionTensors {
  TensorView q, k, v, out;
  TensorView lse;           // float32 [num_heads, total_q]
  TensorView alibi_slopes;  // float32 [num_heads]
  TensorView sinks;         // float32 [num_heads]
  TensorView mask;          // uint8 [total_q, bytes]
  bool mask_is_tree = false;
  KvScales scales;         // of a quantised cache
  void* stream = nullptr;  // a cudaStream_t; null: the default stream. Null on the CPU
};

// Three pure functions: no device is touched, so any machine's decisions can be tested anywhere.
void validate(const AttentionDesc& desc);
void validate(const AttentionDesc& desc, const AttentionBatch& batch);
void validate(const AttentionDesc& desc, const AttentionPlan& plan,
              const AttentionTensors& tensors);
AttentionPlan plan(const AttentionDesc& desc, const AttentionBatch& batch,
                   const PlanTraits& traits);

// A candidate of dispatch(): a kernel, and why it can't be used (empty: it can).
struct Candidate {
  std::string kernel;  // "cpu.avx512.decode+prefill"
  std::string reason;
};

struct Dispatch {
  Backend* backend = nullptr;         // null: no candidate is left
  std::vector<Candidate> candidates;  // in order of preference; the first without a reason wins
  std::string explain() const;
};

Dispatch dispatch(const AttentionDesc& desc, const DeviceInfo& device);

// Per model: validates the description and picks the kernel. Thread-safe once built.
class Attention {
 public:
  // Throws InvalidArgument, or Unsupported with the text of explain().
  explicit Attention(const AttentionDesc& desc, Device device = {});

  AttentionPlan plan(const AttentionBatch& batch) const;
  // A plan for lengths that only a GPU knows: all pointers of `batch`, paged, are to its memory. It
  // is made there, when `stream` comes to it, and runs on that stream. Captured together with its
  // runs it makes a graph that serves every batch up to this one: sequences of no keys, rows of no
  // sequence (they are not written), other lengths, other blocks. The arrays must live as long.
  //
  // `max_total_q` is the rows of q and out; without cu_seqlens_q batch_size. No length is checked:
  // what is out of range counts as the nearest that is not. Throws InvalidArgument for batches too
  // large to plan there, Unsupported on the CPU.
  AttentionPlan plan_on_device(const AttentionBatch& batch, int max_total_q,
                               void* stream = nullptr) const;
  void run(const AttentionPlan& plan, const AttentionTensors& tensors) const;
  // For hosts with threads of their own: run() as `nth` calls, ith = 0 ... nth - 1, in any order
  // and on any threads; when all have returned, `out` has the bits that run() gives. Parts draw
  // work as they come, wait for nobody, and whoever ends the last piece of a row merges it.
  //
  // `workspace` is workspace_size(plan) bytes, aligned to 4, all zeros before its first use and
  // left ready for the next run, of any plan that fits; one run at a time. CPU only.
  void run_part(const AttentionPlan& plan, const AttentionTensors& tensors,
                std::span<std::byte> workspace, int ith, int nth) const;
  size_t workspace_size(const AttentionPlan& plan) const;  // bytes that run() uses for itself
  std::string explain() const { return dispatch_.explain(); }
  const AttentionDesc& desc() const { return desc_; }
  Device device() const { return device_; }

 private:
  void check_device(const AttentionPlan& plan, const AttentionTensors& tensors) const;

  AttentionDesc desc_;
  Device device_;
  Dispatch dispatch_;
};

// One-shot: describe, plan and run. `q` is dense [batch, seq_q, heads, dim] or ragged
// [total_q, heads, dim] with both cu_seqlens; see the Python docstrings for the options.
struct AttentionOptions {
  bool causal = false;
  int window_left = -1;
  int window_right = -1;
  float scale = 0;
  float softcap = 0;
};
void attention(const AttentionTensors& tensors, const AttentionOptions& options,
               const TensorView& cu_seqlens_q = {}, const TensorView& cu_seqlens_k = {});
void paged_attention(const AttentionTensors& tensors, const TensorView& block_table,
                     const TensorView& seq_lens, const AttentionOptions& options,
                     const TensorView& cu_seqlens_q = {});

}  // namespace quire
