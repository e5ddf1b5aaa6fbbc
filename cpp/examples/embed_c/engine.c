/* SPDX-License-Identifier: Apache-2.0
 *
 * An engine's loop in C99: two sequences over one paged KV cache, the second a fork of the first.
 * Prefill, then decode both in one batch; every row is checked against plain loops. The model is
 * one attention layer over made-up vectors. */
#include <math.h>
#include <quire/quire.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 4, KV_HEADS = 2, DIM = 16, BLOCK_SIZE = 8, NUM_BLOCKS = 16 };
enum { PROMPT = 21, MAX_TOKENS = 40, MAX_ROWS = 32 };
enum { Q_ROW = HEADS * DIM, KV_ROW = KV_HEADS * DIM };

#define CHECK(call) check((call), #call)
static void check(QuireStatus status, const char* call) {
  if (status == QUIRE_OK) return;
  fprintf(stderr, "%s\n  %s\n", call,
          status == QUIRE_OUT_OF_BLOCKS ? "out of blocks" : quire_last_error());
  exit(1);
}

/* What a real model has weights for; kind 1: q, 2: k, 3: v. */
static float feature(int kind, int token, int position, int i) {
  return 1.5f * (float)sin(0.7 * kind * token + 0.05 * position + i * (kind + token % 5));
}

static float k_cache[NUM_BLOCKS * BLOCK_SIZE * KV_ROW], v_cache[NUM_BLOCKS * BLOCK_SIZE * KV_ROW];

static QuireTensor cache_tensor(float* cache) {
  const int64_t shape[] = {NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, DIM};
  return quire_tensor(cache, QUIRE_FLOAT32, 4, shape);
}

static QuireTensor rows_tensor(float* rows, int64_t num_rows, int64_t heads) {
  int64_t shape[3];
  shape[0] = num_rows;
  shape[1] = heads;
  shape[2] = DIM;
  return quire_tensor(rows, QUIRE_FLOAT32, 3, shape);
}

/* One layer: writes k and v of the rows' tokens into the cache, then out [total_q, Q_ROW]. */
static void run_layer(const QuireAttention* attention, const QuireAttentionPlan* plan,
                      const QuireStepBatch* batch, const int32_t* tokens, float* out) {
  static float q[MAX_ROWS * Q_ROW], k[MAX_ROWS * KV_ROW], v[MAX_ROWS * KV_ROW];
  for (int64_t r = 0; r < batch->total_q; ++r) {
    for (int i = 0; i < Q_ROW; ++i)
      q[r * Q_ROW + i] = feature(1, tokens[r], batch->positions[r], i);
    for (int i = 0; i < KV_ROW; ++i) {
      k[r * KV_ROW + i] = feature(2, tokens[r], batch->positions[r], i);
      v[r * KV_ROW + i] = feature(3, tokens[r], batch->positions[r], i);
    }
  }
  const QuireTensor q_rows = rows_tensor(q, batch->total_q, HEADS);
  const QuireTensor k_rows = rows_tensor(k, batch->total_q, KV_HEADS);
  const QuireTensor v_rows = rows_tensor(v, batch->total_q, KV_HEADS);
  const QuireTensor out_rows = rows_tensor(out, batch->total_q, HEADS);
  const QuireTensor k_blocks = cache_tensor(k_cache), v_blocks = cache_tensor(v_cache);
  const QuireTensor slots =
      quire_tensor((void*)batch->slot_mapping, QUIRE_INT64, 1, &batch->total_q);

  CHECK(quire_append_kv(&k_rows, &v_rows, &k_blocks, &v_blocks, &slots, NULL, NULL, NULL));
  QuireAttentionTensors tensors = QUIRE_ATTENTION_TENSORS_INIT;
  tensors.q = &q_rows;
  tensors.k = &k_blocks;
  tensors.v = &v_blocks;
  tensors.out = &out_rows;
  CHECK(quire_attention_run(attention, plan, &tensors));
}

/* Plans a step's batch, does the copies that forks ask for, and runs the layers (here: one). */
static void run_step(const QuireAttention* attention, const QuireStepBatch* batch,
                     const int32_t* tokens, float* out) {
  if (batch->num_copies > 0) {
    int64_t shape[2];
    shape[0] = batch->num_copies;
    shape[1] = 2;
    const QuireTensor copies = quire_tensor((void*)batch->copies, QUIRE_INT32, 2, shape);
    const QuireTensor k_blocks = cache_tensor(k_cache), v_blocks = cache_tensor(v_cache);
    CHECK(quire_copy_blocks(&k_blocks, &v_blocks, &copies, NULL));
  }
  QuireAttentionBatch step = QUIRE_ATTENTION_BATCH_INIT;
  step.batch_size = batch->batch_size;
  step.max_blocks = batch->max_blocks;
  step.block_table_stride = batch->block_table_stride;
  step.block_table = batch->block_table;
  step.seq_lens = batch->seq_lens;
  step.cu_seqlens_q = batch->cu_seqlens_q;
  QuireAttentionPlan* plan = NULL;
  CHECK(quire_attention_plan(attention, &step, &plan));
  run_layer(attention, plan, batch, tokens, out);
  quire_attention_plan_delete(plan);
}

/* Largest error of the row of the last of `length` tokens. */
static double error_of(const int32_t* tokens, int length, const float* out) {
  double worst = 0;
  for (int head = 0; head < HEADS; ++head) {
    const int kv = head / (HEADS / KV_HEADS) * DIM;
    double expected[DIM] = {0}, total = 0;
    for (int t = 0; t < length; ++t) {
      double score = 0;
      for (int i = 0; i < DIM; ++i)
        score += (double)feature(1, tokens[length - 1], length - 1, head * DIM + i) *
                 feature(2, tokens[t], t, kv + i);
      const double weight = exp(score / sqrt(DIM));
      total += weight;
      for (int i = 0; i < DIM; ++i) expected[i] += weight * feature(3, tokens[t], t, kv + i);
    }
    for (int i = 0; i < DIM; ++i)
      worst = fmax(worst, fabs(expected[i] / total - out[head * DIM + i]));
  }
  return worst;
}

static QuireAttention* make_attention(void) {
  QuireAttentionDesc desc = QUIRE_ATTENTION_DESC_INIT;
  desc.num_heads = HEADS;
  desc.num_kv_heads = KV_HEADS;
  desc.head_dim = DIM;
  desc.dtype = desc.kv_dtype = QUIRE_FLOAT32;
  desc.block_size = BLOCK_SIZE;
  QuireAttention* attention = NULL;
  CHECK(quire_attention_new(&desc, &attention));
  return attention;
}

static QuireKVCacheManager* make_manager(void) {
  QuireKVCacheConfig config = QUIRE_KV_CACHE_CONFIG_INIT;
  config.num_blocks = NUM_BLOCKS;
  config.block_size = BLOCK_SIZE;
  QuireKVCacheManager* manager = NULL;
  CHECK(quire_kv_cache_manager_new(&config, &manager));
  return manager;
}

int main(void) {
  static float out[MAX_ROWS * Q_ROW];
  static int32_t tokens[2][MAX_TOKENS];
  QuireAttention* attention = make_attention();
  QuireKVCacheManager* manager = make_manager();
  QuireStepBatch batch = QUIRE_STEP_BATCH_INIT;
  QuireSequenceId seqs[2];
  double worst = 0;

  /* Prefill, then fork: the two share every block until one of them writes. */
  for (int t = 0; t < PROMPT; ++t) tokens[0][t] = tokens[1][t] = 3 * t % 50;
  QuirePrompt prompt = QUIRE_PROMPT_INIT;
  prompt.token_ids = tokens[0];
  prompt.num_tokens = PROMPT;
  CHECK(quire_kv_cache_manager_create(manager, &prompt, &seqs[0]));
  const int32_t num_prompt = PROMPT, ones[] = {1, 1};
  CHECK(quire_kv_cache_manager_step(manager, seqs, &num_prompt, 1, &batch));
  run_step(attention, &batch, tokens[0], out);
  for (int t = 0; t < PROMPT; ++t) worst = fmax(worst, error_of(tokens[0], t + 1, &out[t * Q_ROW]));
  CHECK(quire_kv_cache_manager_commit(manager, seqs, 1, NULL, NULL));
  CHECK(quire_kv_cache_manager_fork(manager, seqs[0], &seqs[1]));

  /* Decode: a "sampled" token of each, different ones, so that the first write must copy. */
  int32_t sampled[] = {41, 17};
  CHECK(quire_kv_cache_manager_commit(manager, seqs, 2, sampled, NULL));
  int64_t num_copies = 0;
  for (int length = PROMPT + 1; length <= MAX_TOKENS; ++length) {
    for (int s = 0; s < 2; ++s) tokens[s][length - 1] = sampled[s];
    CHECK(quire_kv_cache_manager_step(manager, seqs, ones, 2, &batch));
    num_copies += batch.num_copies;
    run_step(attention, &batch, sampled, out);
    for (int s = 0; s < 2; ++s) {
      worst = fmax(worst, error_of(tokens[s], length, &out[s * Q_ROW]));
      sampled[s] = (sampled[s] * 7 + s + 1) % 50;
    }
    CHECK(quire_kv_cache_manager_commit(manager, seqs, 2, sampled, NULL));
  }
  CHECK(quire_kv_cache_manager_free(manager, seqs, 2));
  CHECK(quire_kv_cache_manager_validate(manager));
  QuireKVCacheStats stats = QUIRE_KV_CACHE_STATS_INIT;
  CHECK(quire_kv_cache_manager_stats(manager, &stats));
  quire_kv_cache_manager_delete(manager);
  quire_attention_delete(attention);

  printf("quire %s: %d copies, %d blocks in use, error %.1e\n", quire_version(), (int)num_copies,
         stats.used_blocks, worst);
  const int is_right = worst < 1e-4 && num_copies == 1 && stats.used_blocks == 0;
  puts(is_right ? "ok" : "WRONG");
  return is_right ? 0 : 1;
}
