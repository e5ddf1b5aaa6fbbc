/* SPDX-License-Identifier: Apache-2.0
 *
 * The C interface, for engines in C, Rust, Go, ...: plain C99, no exception crosses it.
 *
 *   - Names are those of the C++ headers, where the meaning of each argument is told in full.
 *   - X_new() gives a handle, X_delete() takes it back (NULL is fine), the rest are its methods.
 *   - Every function that can fail returns a QuireStatus; quire_last_error() has the words. A
 *     failed call has changed nothing, its outputs included.
 *   - Arrays and strings are asked for twice: with a NULL buffer *size is set to the elements
 *     needed; else *size says what the buffer holds, and is set to what was written. Where it says
 *     "at most", a NULL buffer gives a size that suffices, and nothing is done yet.
 *   - Structs begin with their size, set by their _INIT macro, so that they can grow at the end
 *     (hence none ends in padding): programs built with an older header keep working.
 *   - Handles may be shared by threads. A step's arrays are for the thread that steps.
 */
#ifndef QUIRE_QUIRE_H_
#define QUIRE_QUIRE_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum QuireStatus {
  QUIRE_OK = 0,
  QUIRE_OUT_OF_BLOCKS = 1,    /* a normal result, no error: free something and try again */
  QUIRE_INVALID_ARGUMENT = 2, /* "function: argument: expected ..., got ..." */
  QUIRE_UNSUPPORTED = 3,      /* no kernel for this: the message has the reason of each candidate */
  QUIRE_OUT_OF_MEMORY = 4,
  QUIRE_INTERNAL_ERROR = 5, /* a broken invariant of quire's own */
  QUIRE_SYSTEM_ERROR = 6    /* the system refused, for example a directory that can't be written */
} QuireStatus;

/* What the latest failed call of this thread says; valid until the next one fails. Never NULL. */
const char* quire_last_error(void);

const char* quire_version(void); /* "0.1.0" */

/* ---- The machine */

QuireStatus quire_cpu_isa(char* buffer, size_t* size); /* "avx512", the final 0 counted in size */
QuireStatus quire_num_threads(int32_t* count);         /* of the pool that runs all work lists */
QuireStatus quire_set_num_threads(int32_t count);

/* ---- Tensors */

enum { QUIRE_MAX_DIMS = 8 };

typedef enum QuireDType {
  QUIRE_FLOAT32 = 0,
  QUIRE_FLOAT16 = 1,
  QUIRE_BFLOAT16 = 2,
  QUIRE_INT32 = 3,
  QUIRE_INT64 = 4,
  QUIRE_UINT8 = 5,
  QUIRE_FLOAT8_E4M3 = 6, /* e4m3fn */
  QUIRE_FLOAT8_E5M2 = 7,
  QUIRE_INT8 = 8
} QuireDType;

typedef enum QuireDeviceType { QUIRE_CPU = 0, QUIRE_CUDA = 1 } QuireDeviceType;

/* A strided view of memory that the caller owns. This struct never changes. */
typedef struct QuireTensor {
  void* data;
  int32_t dtype;       /* QuireDType */
  int32_t device_type; /* QuireDeviceType */
  int32_t device_index;
  int32_t ndim;
  int64_t shape[QUIRE_MAX_DIMS];
  int64_t strides[QUIRE_MAX_DIMS]; /* in elements */
} QuireTensor;

/* A dense row-major view of memory of the CPU. What is wrong with it, its user reports. */
QuireTensor quire_tensor(void* data, QuireDType dtype, int32_t ndim, const int64_t* shape);

/* ---- Attention (attention.h) */

typedef struct QuireAttention QuireAttention;         /* per model */
typedef struct QuireAttentionPlan QuireAttentionPlan; /* per step, serves every layer */

typedef struct QuireAttentionDesc {
  size_t struct_size;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t head_dim_v; /* 0: head_dim */
  int32_t dtype;
  int32_t kv_dtype;
  int32_t block_size; /* tokens; 0: k and v are ragged or dense */
  int32_t causal;
  int32_t window_left, window_right; /* inclusive, -1: open */
  float scale;                       /* 0: 1 / sqrt(head_dim) */
  float softcap;                     /* 0: none */
  int32_t device_type;
  int32_t device_index;
} QuireAttentionDesc;
#define QUIRE_ATTENTION_DESC_INIT \
  {sizeof(QuireAttentionDesc), 0, 0, 0, 0, QUIRE_BFLOAT16, QUIRE_BFLOAT16, 0, 1, -1, -1, 0, 0, 0, 0}

/* paged: block_table, seq_lens, and cu_seqlens_q or NULL (one query row each); ragged: both
 * cu_seqlens; dense: dense_q and dense_k. Read while a plan is made, and then no more. */
typedef struct QuireAttentionBatch {
  size_t struct_size;
  int32_t batch_size;
  int32_t max_blocks;
  int64_t block_table_stride;  /* elements from row to row */
  const int32_t* block_table;  /* [batch, max_blocks] */
  const int32_t* seq_lens;     /* [batch]: keys, the new tokens included */
  const int32_t* cu_seqlens_q; /* [batch + 1] */
  const int32_t* cu_seqlens_k; /* [batch + 1] */
  int32_t dense_q, dense_k;    /* rows and keys of every sequence; -1: not dense */
} QuireAttentionBatch;
#define QUIRE_ATTENTION_BATCH_INIT \
  {sizeof(QuireAttentionBatch), 0, 0, 0, NULL, NULL, NULL, NULL, -1, -1}

/* Ragged and paged shapes; dense ones have [batch] before them. NULL: not given. */
typedef struct QuireAttentionTensors {
  size_t struct_size;
  const QuireTensor* q;            /* [total_q, num_heads, head_dim] */
  const QuireTensor* k;            /* [num_blocks, block_size, num_kv_heads, head_dim] or */
  const QuireTensor* v;            /* [total_k, num_kv_heads, head_dim] */
  const QuireTensor* out;          /* [total_q, num_heads, head_dim_v] */
  const QuireTensor* lse;          /* float32 [num_heads, total_q], natural log */
  const QuireTensor* alibi_slopes; /* float32 [num_heads] */
  const QuireTensor* sinks;        /* float32 [num_heads] */
  const QuireTensor* mask;         /* uint8 [total_q, bytes] */
  int32_t mask_is_tree;
  int32_t reserved;           /* 0 */
  const QuireTensor* k_scale; /* of a quantised cache (kv_scales.h); NULL: 1 */
  const QuireTensor* v_scale;
  void* stream; /* a cudaStream_t; NULL: the default stream. NULL on the CPU */
} QuireAttentionTensors;
#define QUIRE_ATTENTION_TENSORS_INIT \
  {sizeof(QuireAttentionTensors),    \
   NULL,                             \
   NULL,                             \
   NULL,                             \
   NULL,                             \
   NULL,                             \
   NULL,                             \
   NULL,                             \
   NULL,                             \
   0,                                \
   0,                                \
   NULL,                             \
   NULL,                             \
   NULL}

QuireStatus quire_attention_new(const QuireAttentionDesc* desc, QuireAttention** attention);
void quire_attention_delete(QuireAttention* attention);
QuireStatus quire_attention_explain(const QuireAttention* attention, char* buffer, size_t* size);
QuireStatus quire_attention_plan(const QuireAttention* attention, const QuireAttentionBatch* batch,
                                 QuireAttentionPlan** plan);
/* A plan for lengths that only a GPU knows: a paged batch, all of its pointers to that GPU's
 * memory, and the arrays live as long as the plan. It is made there when `stream` (a cudaStream_t;
 * NULL: the default one) comes to it, and runs on that stream. Captured together with its runs it
 * makes a graph that serves every batch up to this one: other lengths, other blocks, sequences
 * without keys or rows. max_total_q: rows of q and out; batch_size where cu_seqlens_q is NULL.
 * Lengths out of range count as the nearest that is not. */
QuireStatus quire_attention_plan_on_device(const QuireAttention* attention,
                                           const QuireAttentionBatch* batch, int32_t max_total_q,
                                           void* stream, QuireAttentionPlan** plan);
void quire_attention_plan_delete(QuireAttentionPlan* plan);
/* Bytes that run() uses for itself. */
QuireStatus quire_attention_workspace_size(const QuireAttention* attention,
                                           const QuireAttentionPlan* plan, size_t* bytes);
QuireStatus quire_attention_run(const QuireAttention* attention, const QuireAttentionPlan* plan,
                                const QuireAttentionTensors* tensors);

/* For hosts with threads of their own: run() as nth calls, ith = 0 ... nth - 1, in any order and on
 * any threads; when all have returned, out has the bits that run() gives. workspace: at least
 * quire_attention_workspace_size() bytes, aligned to 4, all zeros before its first use and left
 * ready for the next run; one run at a time. CPU only. */
QuireStatus quire_attention_run_part(const QuireAttention* attention,
                                     const QuireAttentionPlan* plan,
                                     const QuireAttentionTensors* tensors, void* workspace,
                                     size_t workspace_size, int32_t ith, int32_t nth);

/* One-shot: describe, plan and run. */
typedef struct QuireAttentionOptions {
  size_t struct_size;
  int32_t causal;
  int32_t window_left, window_right;
  float scale;
  float softcap;
  int32_t reserved; /* 0 */
} QuireAttentionOptions;
#define QUIRE_ATTENTION_OPTIONS_INIT {sizeof(QuireAttentionOptions), 0, -1, -1, 0, 0, 0}

/* Dense, or ragged with both cu_seqlens (int32 [batch + 1]). */
QuireStatus quire_attention(const QuireAttentionTensors* tensors,
                            const QuireAttentionOptions* options, const QuireTensor* cu_seqlens_q,
                            const QuireTensor* cu_seqlens_k);
/* cu_seqlens_q NULL: one query row each. */
QuireStatus quire_paged_attention(const QuireAttentionTensors* tensors,
                                  const QuireTensor* block_table, const QuireTensor* seq_lens,
                                  const QuireAttentionOptions* options,
                                  const QuireTensor* cu_seqlens_q);

/* ---- Cache operations (cache_ops.h); `stream` as in QuireAttentionTensors */

QuireStatus quire_append_kv(const QuireTensor* k, const QuireTensor* v, const QuireTensor* k_cache,
                            const QuireTensor* v_cache, const QuireTensor* slot_mapping,
                            const QuireTensor* k_scale, const QuireTensor* v_scale, /* or NULL */
                            void* stream);
QuireStatus quire_copy_blocks(const QuireTensor* k_cache, const QuireTensor* v_cache,
                              const QuireTensor* src_dst, void* stream);
QuireStatus quire_merge_states(const QuireTensor* outs, const QuireTensor* lses,
                               const QuireTensor* out, const QuireTensor* lse, /* lse: or NULL */
                               void* stream);

/* ---- Blocks that travel (block_ranges.h) */

typedef struct QuireMemoryRange { /* as POSIX's struct iovec */
  void* data;
  size_t size; /* bytes */
} QuireMemoryRange;

typedef struct QuireRangePair {
  void* source;
  void* destination;
  size_t size;
} QuireRangePair;

/* Where the blocks of the pools, tensors [num_blocks, ...], lie: to be read, and to be written. */
QuireStatus quire_export_blocks(const QuireTensor* pools, size_t num_pools, const int32_t* blocks,
                                size_t num_blocks, QuireMemoryRange* buffer, size_t* size);
QuireStatus quire_import_blocks(const QuireTensor* pools, size_t num_pools, const int32_t* blocks,
                                size_t num_blocks, QuireMemoryRange* buffer, size_t* size);
/* Cuts two lists of as many bytes so that the n-th pieces have one size. */
QuireStatus quire_pair_ranges(const QuireMemoryRange* sources, size_t num_sources,
                              const QuireMemoryRange* destinations, size_t num_destinations,
                              QuireRangePair* buffer, size_t* size);

/* ---- Sequences and their blocks */

#include "quire/quire_kv.h"

/* ---- Continuous batching (scheduler.h) */

typedef struct QuireScheduler QuireScheduler; /* to be deleted before its manager */

typedef struct QuireSchedulerConfig {
  size_t struct_size;
  int32_t max_tokens_per_step;
  int32_t max_seqs;
  double watermark;
  int32_t prefix_window;
  int32_t max_overtakes;
  /* What preemption costs (preemption.h). bytes_per_second 0: all is computed again; else, with
   * num_host_blocks > 0, blocks go to host memory where that is cheaper. */
  double seconds_per_token, seconds_per_token_pair;
  double bytes_per_second, seconds_per_swap;
  int64_t bytes_per_block;
} QuireSchedulerConfig;
#define QUIRE_SCHEDULER_CONFIG_INIT \
  {sizeof(QuireSchedulerConfig), 2048, 256, 0.01, 1, 256, 0, 0, 0, 0, 0}

typedef struct QuireRequest {
  size_t struct_size;
  const int32_t* token_ids;
  size_t num_tokens;
  const char* salt; /* as in QuirePrompt */
  size_t salt_size;
  const char* tenant; /* NULL: "" */
  size_t tenant_size;
  int32_t max_new_tokens;
  int32_t priority; /* higher ones come first */
} QuireRequest;
#define QUIRE_REQUEST_INIT {sizeof(QuireRequest), NULL, 0, NULL, 0, NULL, 0, 0, 0}

/* Valid until the next schedule(). */
typedef struct QuireScheduledBatch {
  size_t struct_size;
  const int32_t* request_ids;    /* [num_rows] */
  const int32_t* num_new_tokens; /* [num_rows] */
  const int32_t* token_ids;      /* [num_token_ids]: to compute, row after row */
  const int32_t* sampling;       /* [num_sampling]: rows that compute their last known token */
  int64_t num_rows, num_token_ids, num_sampling;
  int64_t num_preempted; /* since the batch before */
  /* [num_swap_out], [num_swap_in]: (block, host block) and (host block, block) to copy, in this
   * order, before the copies of the step. What was evicted for them: take_offloads() first. */
  const struct QuireBlockPair* swap_out;
  const struct QuireBlockPair* swap_in;
  int64_t num_swap_out, num_swap_in;
} QuireScheduledBatch;
#define QUIRE_SCHEDULED_BATCH_INIT \
  {sizeof(QuireScheduledBatch), NULL, NULL, NULL, NULL, 0, 0, 0, 0, NULL, NULL, 0, 0}

typedef struct QuireSchedulerInfo {
  size_t struct_size;
  int32_t num_running, num_waiting; /* both 0: no work left */
  int64_t num_preemptions;
} QuireSchedulerInfo;
#define QUIRE_SCHEDULER_INFO_INIT {sizeof(QuireSchedulerInfo), 0, 0, 0}

QuireStatus quire_scheduler_new(QuireKVCacheManager* manager, const QuireSchedulerConfig* config,
                                QuireScheduler** scheduler);
void quire_scheduler_delete(QuireScheduler* scheduler);
QuireStatus quire_scheduler_add(QuireScheduler* scheduler, const QuireRequest* request,
                                int32_t* request_id);
/* num_rows 0: nothing to do or, if requests are left, all blocks wait for retire(). */
QuireStatus quire_scheduler_schedule(QuireScheduler* scheduler, QuireScheduledBatch* batch,
                                     QuireStepBatch* step);
/* One token for each of the batch's `sampling`. finished: ids of the requests that have ended,
 * valid until the next commit. */
QuireStatus quire_scheduler_commit(QuireScheduler* scheduler, const int32_t* sampled,
                                   size_t num_sampled, const int32_t** finished,
                                   size_t* num_finished);
QuireStatus quire_scheduler_finish(QuireScheduler* scheduler, int32_t request_id); /* early */
QuireStatus quire_scheduler_info(const QuireScheduler* scheduler, QuireSchedulerInfo* info);
/* What the latest schedule() decided and why, in lines. */
QuireStatus quire_scheduler_explain(const QuireScheduler* scheduler, char* buffer, size_t* size);
QuireStatus quire_scheduler_validate(const QuireScheduler* scheduler);

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_QUIRE_H_ */
