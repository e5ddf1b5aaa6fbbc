// SPDX-License-Identifier: Apache-2.0
// The C interface: errors come as codes with words and change nothing, NULL is refused, sizes are
// asked first, structs of older and newer headers are understood. That its results are right is
// shown by cpp/examples/embed_c.
#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "quire/quire.h"

namespace {

std::string error_of(QuireStatus status, QuireStatus expected = QUIRE_INVALID_ARGUMENT) {
  CHECK(status == expected);
  return quire_last_error();
}

QuireAttention* make_attention(int block_size) {
  QuireAttentionDesc desc = QUIRE_ATTENTION_DESC_INIT;
  desc.num_heads = 2;
  desc.num_kv_heads = 1;
  desc.head_dim = 4;
  desc.dtype = desc.kv_dtype = QUIRE_FLOAT32;
  desc.block_size = block_size;
  QuireAttention* attention = nullptr;
  REQUIRE(quire_attention_new(&desc, &attention) == QUIRE_OK);
  return attention;
}

QuireKVCacheManager* make_manager(int num_blocks) {
  QuireKVCacheConfig config = QUIRE_KV_CACHE_CONFIG_INIT;
  config.num_blocks = num_blocks;
  config.block_size = 4;
  QuireKVCacheManager* manager = nullptr;
  REQUIRE(quire_kv_cache_manager_new(&config, &manager) == QUIRE_OK);
  return manager;
}

QuireTensor tensor(std::vector<float>& data, std::vector<int64_t> shape) {
  return quire_tensor(data.data(), QUIRE_FLOAT32, static_cast<int32_t>(shape.size()), shape.data());
}

QuireSequenceId create(QuireKVCacheManager* manager, const std::vector<int32_t>& tokens) {
  QuirePrompt prompt = QUIRE_PROMPT_INIT;
  prompt.token_ids = tokens.data();
  prompt.num_tokens = tokens.size();
  QuireSequenceId seq;
  REQUIRE(quire_kv_cache_manager_create(manager, &prompt, &seq) == QUIRE_OK);
  return seq;
}

QuireKVCacheStats stats_of(const QuireKVCacheManager* manager) {
  QuireKVCacheStats stats = QUIRE_KV_CACHE_STATS_INIT;
  REQUIRE(quire_kv_cache_manager_stats(manager, &stats) == QUIRE_OK);
  REQUIRE(quire_kv_cache_manager_validate(manager) == QUIRE_OK);
  return stats;
}

}  // namespace

TEST_CASE("the machine") {
  CHECK(std::string(quire_version()).find('.') != std::string::npos);
  size_t size = 0;
  REQUIRE(quire_cpu_isa(nullptr, &size) == QUIRE_OK);
  std::string isa(size, '?');
  REQUIRE(quire_cpu_isa(isa.data(), &size) == QUIRE_OK);
  CHECK(isa.back() == '\0');
  int32_t threads = 0;
  REQUIRE(quire_num_threads(&threads) == QUIRE_OK);
  CHECK(threads >= 1);
  CHECK(error_of(quire_set_num_threads(0)).find("set_num_threads") != std::string::npos);
  CHECK(error_of(quire_num_threads(nullptr)) ==
        "quire_num_threads: count: expected a pointer, got NULL");
}

TEST_CASE("a buffer too small is refused, and holds what it held") {
  QuireAttention* attention = make_attention(4);
  size_t needed = 0;
  REQUIRE(quire_attention_explain(attention, nullptr, &needed) == QUIRE_OK);
  std::string text(needed, '?');
  size_t size = needed - 1;
  CHECK(error_of(quire_attention_explain(attention, text.data(), &size)).find("expected room") !=
        std::string::npos);
  CHECK(text == std::string(needed, '?'));
  CHECK(size == needed - 1);
  size = needed + 5;
  REQUIRE(quire_attention_explain(attention, text.data(), &size) == QUIRE_OK);
  CHECK(size == needed);
  CHECK(text.find("cpu.") != std::string::npos);
  quire_attention_delete(attention);
}

TEST_CASE("errors are told to the thread that made them") {
  error_of(quire_set_num_threads(-3));
  const std::string mine = quire_last_error();
  std::string fresh = "?";
  std::thread([&] {
    fresh = quire_last_error();
    error_of(quire_num_threads(nullptr));
  }).join();
  CHECK(fresh.empty());
  CHECK(quire_last_error() == mine);
}

TEST_CASE("attention: null handles, wrong descriptions, no kernel") {
  QuireAttention* attention = nullptr;
  QuireAttentionDesc desc = QUIRE_ATTENTION_DESC_INIT;
  CHECK(error_of(quire_attention_new(&desc, &attention)).find("num_heads") != std::string::npos);
  CHECK(error_of(quire_attention_new(nullptr, &attention)).find("desc") != std::string::npos);
  CHECK(error_of(quire_attention_new(&desc, nullptr)).find("attention") != std::string::npos);
  desc.dtype = 77;
  CHECK(error_of(quire_attention_new(&desc, &attention)).find("got 77") != std::string::npos);
  desc.dtype = QUIRE_FLOAT32;
  desc.num_heads = desc.num_kv_heads = 1;
  desc.head_dim = 100000;
  CHECK(error_of(quire_attention_new(&desc, &attention), QUIRE_UNSUPPORTED).find("cpu.") !=
        std::string::npos);
  CHECK(attention == nullptr);
  CHECK(error_of(quire_attention_run(nullptr, nullptr, nullptr)).find("attention: expected") !=
        std::string::npos);
  quire_attention_delete(nullptr);
  quire_attention_plan_delete(nullptr);
}

TEST_CASE("attention: a batch and its tensors") {
  QuireAttention* attention = make_attention(4);
  QuireAttentionPlan* plan = nullptr;
  QuireAttentionBatch batch = QUIRE_ATTENTION_BATCH_INIT;
  batch.batch_size = 1;
  CHECK(error_of(quire_attention_plan(attention, &batch, &plan)).find("seq_lens") !=
        std::string::npos);
  const int32_t seq_lens[] = {3}, block_table[] = {1};
  batch.seq_lens = seq_lens;
  batch.max_blocks = 1;
  batch.block_table_stride = 1;
  CHECK(error_of(quire_attention_plan(attention, &batch, &plan)).find("block_table") !=
        std::string::npos);
  CHECK(plan == nullptr);
  batch.block_table = block_table;
  CHECK(error_of(quire_attention_plan_on_device(attention, &batch, 1, nullptr, &plan),
                 QUIRE_UNSUPPORTED) == "plan: cpu plans of lengths on the host only");
  CHECK(plan == nullptr);
  REQUIRE(quire_attention_plan(attention, &batch, &plan) == QUIRE_OK);
  size_t bytes = 1;
  CHECK(quire_attention_workspace_size(attention, plan, &bytes) == QUIRE_OK);

  std::vector<float> q(8, 1), cache(2 * 4 * 4, 2), out(8, -1);
  const QuireTensor q_view = tensor(q, {1, 2, 4}), cache_view = tensor(cache, {2, 4, 1, 4});
  QuireTensor out_view = tensor(out, {1, 2, 4});
  QuireAttentionTensors tensors = QUIRE_ATTENTION_TENSORS_INIT;
  tensors.q = &q_view;
  tensors.k = tensors.v = &cache_view;
  CHECK(error_of(quire_attention_run(attention, plan, &tensors)) ==
        "quire_attention_run: out: expected a pointer, got NULL");
  tensors.out = &out_view;
  out_view.data = nullptr;
  CHECK(error_of(quire_attention_run(attention, plan, &tensors)).find("NULL data") !=
        std::string::npos);
  out_view.data = out.data();
  out_view.shape[0] = -1;
  CHECK(error_of(quire_attention_run(attention, plan, &tensors)).find("extents") !=
        std::string::npos);
  out_view.shape[0] = 1;
  out_view.ndim = 9;
  CHECK(error_of(quire_attention_run(attention, plan, &tensors)).find("dimensions, got 9") !=
        std::string::npos);
  CHECK(out == std::vector<float>(8, -1));
  out_view.ndim = 3;
  REQUIRE(quire_attention_run(attention, plan, &tensors) == QUIRE_OK);
  CHECK(out == std::vector<float>(8, 2));

  std::vector<uint32_t> workspace(bytes / 4 + 1);
  const auto run_part = [&](int ith, int nth, size_t size) {
    return quire_attention_run_part(attention, plan, &tensors, workspace.data(), size, ith, nth);
  };
  out.assign(8, -1);
  CHECK(error_of(run_part(2, 2, bytes)) == "run_part: ith: expected 0 to 1, got 2");
  CHECK(error_of(run_part(0, 0, bytes)).find("nth: expected at least 1") != std::string::npos);
  CHECK(error_of(run_part(0, 2, bytes - 1)).find("workspace: expected") != std::string::npos);
  CHECK(error_of(quire_attention_run_part(attention, plan, &tensors, nullptr, bytes, 0, 2)) ==
        "quire_attention_run_part: workspace: expected a pointer, got NULL");
  CHECK(out == std::vector<float>(8, -1));
  for (int ith : {1, 0}) REQUIRE(run_part(ith, 2, bytes) == QUIRE_OK);
  CHECK(out == std::vector<float>(8, 2));
  quire_attention_plan_delete(plan);
  quire_attention_delete(attention);
}

TEST_CASE("one-shot calls and cache operations") {
  std::vector<float> q(8, 1), kv(12, 2), out(8), lse(2);
  const QuireTensor q_view = tensor(q, {1, 1, 2, 4}), kv_view = tensor(kv, {1, 3, 1, 4});
  const QuireTensor out_view = tensor(out, {1, 1, 2, 4}), lse_view = tensor(lse, {1, 2, 1});
  QuireAttentionTensors dense = QUIRE_ATTENTION_TENSORS_INIT;
  dense.q = &q_view;
  dense.k = dense.v = &kv_view;
  dense.out = &out_view;
  dense.lse = &lse_view;
  const QuireAttentionOptions options = QUIRE_ATTENTION_OPTIONS_INIT;
  REQUIRE(quire_attention(&dense, &options, nullptr, nullptr) == QUIRE_OK);
  CHECK(out == std::vector<float>(8, 2));
  CHECK(lse[0] == doctest::Approx(4 + std::log(3.0)));

  // The same through a paged cache: 3 tokens in block 1, copied to block 0.
  std::vector<float> k_cache(32), v_cache(32);
  int64_t slots[] = {4, 5, 6};
  int32_t copies[] = {1, 0}, block_ids[] = {0}, lengths[] = {3};
  const int64_t three = 3, one_two[] = {1, 2}, ones[] = {1, 1};
  const QuireTensor k_view = tensor(k_cache, {2, 4, 1, 4}), v_view = tensor(v_cache, {2, 4, 1, 4});
  const QuireTensor new_kv = tensor(kv, {3, 1, 4}), q_rows = tensor(q, {1, 2, 4});
  const QuireTensor out_rows = tensor(out, {1, 2, 4});
  const QuireTensor slot_view = quire_tensor(slots, QUIRE_INT64, 1, &three);
  const QuireTensor copy_view = quire_tensor(copies, QUIRE_INT32, 2, one_two);
  const QuireTensor table = quire_tensor(block_ids, QUIRE_INT32, 2, ones);
  const QuireTensor seq_lens = quire_tensor(lengths, QUIRE_INT32, 1, ones);
  REQUIRE(quire_append_kv(&new_kv, &new_kv, &k_view, &v_view, &slot_view, nullptr, nullptr,
                          nullptr) == QUIRE_OK);
  REQUIRE(quire_copy_blocks(&k_view, &v_view, &copy_view, nullptr) == QUIRE_OK);
  QuireAttentionTensors paged = QUIRE_ATTENTION_TENSORS_INIT;
  paged.q = &q_rows;
  paged.k = &k_view;
  paged.v = &v_view;
  paged.out = &out_rows;
  std::fill(out.begin(), out.end(), 0.0f);
  REQUIRE(quire_paged_attention(&paged, &table, &seq_lens, &options, nullptr) == QUIRE_OK);
  CHECK(out == std::vector<float>(8, 2));

  // Two states, one of which saw nothing.
  std::vector<float> outs(16, 2), lses = {1, 1, -std::numeric_limits<float>::infinity(),
                                          -std::numeric_limits<float>::infinity()};
  const QuireTensor outs_view = tensor(outs, {2, 1, 2, 4}), lses_view = tensor(lses, {2, 2, 1});
  REQUIRE(quire_merge_states(&outs_view, &lses_view, &out_rows, nullptr, nullptr) == QUIRE_OK);
  CHECK(out == std::vector<float>(8, 2));
  slots[1] = 99;
  CHECK(error_of(quire_append_kv(&new_kv, &new_kv, &k_view, &v_view, &slot_view, nullptr, nullptr,
                                 nullptr))
            .find("99") != std::string::npos);
}

TEST_CASE("a quantised cache: given scales, scales a token, and what is refused") {
  std::vector<float> k(12, 3), v(12, -4), q(8, 1), out(8), numbers = {0.5f, 0.25f};
  std::vector<float> k_scales(8, 7), v_scales(8, 7);
  std::vector<int8_t> k_cache(32, 99), v_cache(32, 99);
  const int64_t cache_shape[] = {2, 4, 1, 4}, three = 3, ones[] = {1, 1};
  int64_t slots[] = {4, 5, 6};
  int32_t block_ids[] = {1}, lengths[] = {3};
  const QuireTensor k_rows = tensor(k, {3, 1, 4}), v_rows = tensor(v, {3, 1, 4});
  const QuireTensor k_view = quire_tensor(k_cache.data(), QUIRE_INT8, 4, cache_shape);
  const QuireTensor v_view = quire_tensor(v_cache.data(), QUIRE_INT8, 4, cache_shape);
  const QuireTensor slot_view = quire_tensor(slots, QUIRE_INT64, 1, &three);
  const QuireTensor table = quire_tensor(block_ids, QUIRE_INT32, 2, ones);
  const QuireTensor seq_lens = quire_tensor(lengths, QUIRE_INT32, 1, ones);
  const QuireTensor q_rows = tensor(q, {1, 2, 4}), out_rows = tensor(out, {1, 2, 4});
  const QuireAttentionOptions options = QUIRE_ATTENTION_OPTIONS_INIT;
  QuireAttentionTensors paged = QUIRE_ATTENTION_TENSORS_INIT;
  paged.q = &q_rows;
  paged.k = &k_view;
  paged.v = &v_view;
  paged.out = &out_rows;
  const auto round_trip = [&](const QuireTensor& k_scale, const QuireTensor& v_scale) {
    REQUIRE(quire_append_kv(&k_rows, &v_rows, &k_view, &v_view, &slot_view, &k_scale, &v_scale,
                            nullptr) == QUIRE_OK);
    paged.k_scale = &k_scale;
    paged.v_scale = &v_scale;
    REQUIRE(quire_paged_attention(&paged, &table, &seq_lens, &options, nullptr) == QUIRE_OK);
    for (float x : out) CHECK(x == doctest::Approx(-4));
  };
  const int64_t one = 1;
  QuireTensor number = quire_tensor(&numbers[0], QUIRE_FLOAT32, 1, &one);
  round_trip(number, quire_tensor(&numbers[1], QUIRE_FLOAT32, 1, &one));
  CHECK(k_cache[16] == 6);
  CHECK(v_cache[27] == -16);
  CHECK(k_cache[28] == 99);
  round_trip(tensor(k_scales, {2, 4, 1}), tensor(v_scales, {2, 4, 1}));
  CHECK(k_scales[4] == 3 / 127.0f);
  CHECK(v_scales[6] == 4 / 127.0f);
  CHECK(v_scales[7] == 7);
  CHECK(v_cache[27] == -127);
  numbers[0] = 0;
  const std::string error = error_of(
      quire_append_kv(&k_rows, &v_rows, &k_view, &v_view, &slot_view, &number, nullptr, nullptr));
  CHECK(error.find("k_scale: expected a finite number > 0") != std::string::npos);
}

TEST_CASE("manager: the life of a sequence leaks nothing") {
  QuireKVCacheManager* manager = make_manager(4);
  std::vector<int32_t> tokens(9);
  std::iota(tokens.begin(), tokens.end(), 0);
  QuireSequenceId seqs[] = {create(manager, tokens), {}};
  const int32_t nine = 9, ones[] = {1, 1}, sampled[] = {50, 60, 61}, counts[] = {1, 2};
  QuireStepBatch batch = QUIRE_STEP_BATCH_INIT;
  REQUIRE(quire_kv_cache_manager_step(manager, seqs, &nine, 1, &batch) == QUIRE_OK);
  CHECK(batch.total_q == 9);
  CHECK(batch.max_blocks == 3);
  REQUIRE(quire_kv_cache_manager_commit(manager, seqs, 1, nullptr, nullptr) == QUIRE_OK);
  REQUIRE(quire_kv_cache_manager_fork(manager, seqs[0], &seqs[1]) == QUIRE_OK);
  REQUIRE(quire_kv_cache_manager_commit(manager, seqs, 2, sampled, counts) == QUIRE_OK);

  size_t size = 0;
  REQUIRE(quire_kv_cache_manager_block_table(manager, seqs[1], nullptr, &size) == QUIRE_OK);
  std::vector<int32_t> ids(size);
  REQUIRE(quire_kv_cache_manager_block_table(manager, seqs[1], ids.data(), &size) == QUIRE_OK);
  CHECK(ids.size() == 3);
  REQUIRE(quire_kv_cache_manager_step(manager, seqs, ones, 2, &batch) == QUIRE_OK);
  CHECK(batch.num_copies == 1);
  REQUIRE(quire_kv_cache_manager_commit(manager, seqs, 2, nullptr, nullptr) == QUIRE_OK);
  REQUIRE(quire_kv_cache_manager_truncate(manager, seqs[1], 10) == QUIRE_OK);
  QuireSequenceInfo info = QUIRE_SEQUENCE_INFO_INIT;
  REQUIRE(quire_kv_cache_manager_sequence(manager, seqs[1], &info) == QUIRE_OK);
  CHECK(info.num_tokens == 10);

  int64_t num_found = 0;
  QuirePrompt prompt = QUIRE_PROMPT_INIT;
  prompt.token_ids = tokens.data();
  prompt.num_tokens = tokens.size();
  REQUIRE(quire_kv_cache_manager_match(manager, &prompt, &num_found) == QUIRE_OK);
  CHECK(num_found == 8);
  prompt.salt = "tenant";
  prompt.salt_size = 6;
  REQUIRE(quire_kv_cache_manager_match(manager, &prompt, &num_found) == QUIRE_OK);
  CHECK(num_found == 0);

  REQUIRE(quire_kv_cache_manager_free(manager, seqs, 2) == QUIRE_OK);
  CHECK(stats_of(manager).used_blocks == 0);
  quire_kv_cache_manager_delete(manager);
}

TEST_CASE("manager: refusals and out of blocks change nothing") {
  QuireKVCacheManager* manager = make_manager(2);
  const std::vector<int32_t> tokens(9, 7);
  const QuireSequenceId seq = create(manager, tokens);
  const int32_t nine = 9, four = 4, minus_one = -1, token = 1;
  QuireStepBatch batch = QUIRE_STEP_BATCH_INIT;
  batch.total_q = 1234;
  CHECK(quire_kv_cache_manager_step(manager, &seq, &nine, 1, &batch) == QUIRE_OUT_OF_BLOCKS);
  CHECK(batch.total_q == 1234);
  error_of(quire_kv_cache_manager_step(manager, &seq, &nine, 1, nullptr));
  error_of(quire_kv_cache_manager_step(manager, &seq, nullptr, 1, &batch));
  error_of(quire_kv_cache_manager_step(manager, nullptr, &four, 1, &batch));
  error_of(quire_kv_cache_manager_commit(manager, &seq, 1, &token, &minus_one));
  error_of(quire_kv_cache_manager_commit(manager, &seq, 1, nullptr, &four));
  error_of(quire_kv_cache_manager_truncate(manager, seq, 0));
  error_of(quire_kv_cache_manager_create(manager, nullptr, nullptr));
  QuireSequenceId far = seq;
  far.value += int64_t{1} << 32;  // an id that was never given
  CHECK(error_of(quire_kv_cache_manager_free(manager, &far, 1)).find("live sequence") !=
        std::string::npos);
  CHECK(stats_of(manager).used_blocks == 0);
  REQUIRE(quire_kv_cache_manager_free(manager, &seq, 1) == QUIRE_OK);
  CHECK(error_of(quire_kv_cache_manager_free(manager, &seq, 1)).find("live sequence") !=
        std::string::npos);
  error_of(quire_kv_cache_manager_retire(manager, 1));
  error_of(quire_kv_cache_manager_stats(manager, nullptr));
  error_of(quire_kv_cache_manager_validate(nullptr));
  quire_kv_cache_manager_delete(manager);
  quire_kv_cache_manager_delete(nullptr);
}

TEST_CASE("structs of other versions") {
  struct Newer {
    QuireKVCacheConfig config = QUIRE_KV_CACHE_CONFIG_INIT;
    int64_t option = 0;
  } newer;
  newer.config.struct_size = sizeof(newer);
  newer.config.num_blocks = 4;
  QuireKVCacheManager* manager = nullptr;
  newer.option = 1;
  CHECK(error_of(quire_kv_cache_manager_new(&newer.config, &manager)).find("option") !=
        std::string::npos);
  newer.option = 0;
  REQUIRE(quire_kv_cache_manager_new(&newer.config, &manager) == QUIRE_OK);
  for (size_t unset : {size_t{0}, SIZE_MAX}) {
    newer.config.struct_size = unset;
    CHECK(error_of(quire_kv_cache_manager_new(&newer.config, &manager)).find("_INIT") !=
          std::string::npos);
  }

  QuireKVCacheStats stats = QUIRE_KV_CACHE_STATS_INIT;  // as a header without the last field has it
  stats.struct_size = offsetof(QuireKVCacheStats, evicted_blocks);
  stats.evicted_blocks = 77;
  REQUIRE(quire_kv_cache_manager_stats(manager, &stats) == QUIRE_OK);
  CHECK(stats.num_blocks == 4);
  CHECK(stats.evicted_blocks == 77);
  quire_kv_cache_manager_delete(manager);
}
