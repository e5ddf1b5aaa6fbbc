// SPDX-License-Identifier: Apache-2.0
// The C interface of plans that a GPU makes, over the emulated one: it lies in the same folder.
#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "quire/quire.h"

namespace {

constexpr int kHeads = 8, kKvHeads = 2, kHeadDim = 64, kBlockSize = 16, kBlocks = 80;

struct Model {
  QuireAttention* attention = nullptr;

  explicit Model(QuireDeviceType device) {
    QuireAttentionDesc desc = QUIRE_ATTENTION_DESC_INIT;
    desc.num_heads = kHeads;
    desc.num_kv_heads = kKvHeads;
    desc.head_dim = kHeadDim;
    desc.dtype = desc.kv_dtype = QUIRE_FLOAT16;
    desc.block_size = kBlockSize;
    desc.device_type = device;
    const QuireStatus status = quire_attention_new(&desc, &attention);
    REQUIRE_MESSAGE(status == QUIRE_OK, std::string(quire_last_error()));
  }
  ~Model() { quire_attention_delete(attention); }
};

// Float16 of [1/8, 1).
std::vector<uint16_t> draw(size_t count) {
  static std::mt19937 random(5);
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) value = static_cast<uint16_t>(0x3000 + random() % 0xc00);
  return values;
}

QuireTensor on_gpu(std::vector<uint16_t>& values, std::vector<int64_t> shape) {
  QuireTensor tensor =
      quire_tensor(values.data(), QUIRE_FLOAT16, static_cast<int32_t>(shape.size()), shape.data());
  tensor.device_type = QUIRE_CUDA;
  return tensor;
}

struct Lengths {
  std::vector<int32_t> keys, cu = {0}, table;
  QuireAttentionBatch batch = QUIRE_ATTENTION_BATCH_INIT;

  Lengths(const std::vector<int32_t>& rows, std::vector<int32_t> seq_lens)
      : keys(std::move(seq_lens)) {
    for (int32_t count : rows) cu.push_back(cu.back() + count);
    for (size_t i = 0; i < keys.size() * kBlocks; ++i)
      table.push_back(static_cast<int32_t>(i * 7 % kBlocks));
    batch.batch_size = static_cast<int32_t>(keys.size());
    batch.block_table = table.data();
    batch.max_blocks = kBlocks;
    batch.block_table_stride = kBlocks;
    batch.seq_lens = keys.data();
    batch.cu_seqlens_q = cu.data();
  }
};

std::vector<uint16_t> run(const Model& model, const QuireAttentionPlan* plan, int rows) {
  static std::vector<uint16_t> k = draw(kBlocks * kBlockSize * kKvHeads * kHeadDim),
                               v = draw(k.size()), queries = draw(64 * kHeads * kHeadDim);
  std::vector<uint16_t> q(queries.begin(), queries.begin() + rows * kHeads * kHeadDim);
  std::vector<uint16_t> out(q.size(), 0x7e00);
  const QuireTensor views[] = {
      on_gpu(q, {rows, kHeads, kHeadDim}), on_gpu(k, {kBlocks, kBlockSize, kKvHeads, kHeadDim}),
      on_gpu(v, {kBlocks, kBlockSize, kKvHeads, kHeadDim}), on_gpu(out, {rows, kHeads, kHeadDim})};
  QuireAttentionTensors tensors = QUIRE_ATTENTION_TENSORS_INIT;
  tensors.q = &views[0], tensors.k = &views[1], tensors.v = &views[2], tensors.out = &views[3];
  const QuireStatus status = quire_attention_run(model.attention, plan, &tensors);
  REQUIRE_MESSAGE(status == QUIRE_OK, std::string(quire_last_error()));
  return out;
}

TEST_CASE("a plan of the device gives the bits of one of the host") {
  const Model model(QUIRE_CUDA);
  for (const Lengths& lengths :
       {Lengths({1, 1, 1, 1}, {1200, 3, 0, 700}), Lengths({5, 40, 0}, {900, 41, 7})}) {
    const int32_t total = lengths.cu.back();
    QuireAttentionPlan *host = nullptr, *device = nullptr;
    REQUIRE(quire_attention_plan(model.attention, &lengths.batch, &host) == QUIRE_OK);
    REQUIRE(quire_attention_plan_on_device(model.attention, &lengths.batch, total, nullptr,
                                           &device) == QUIRE_OK);
    size_t bytes = 0;
    CHECK(quire_attention_workspace_size(model.attention, device, &bytes) == QUIRE_OK);
    CHECK(bytes > 0);
    const std::vector<uint16_t> expected = run(model, host, total);
    CHECK(expected[0] < 0x3c00);  // of values below 1
    CHECK(run(model, device, total) == expected);
    quire_attention_plan_delete(host);
    quire_attention_plan_delete(device);
  }
}

TEST_CASE("what is refused leaves no plan") {
  const Model model(QUIRE_CUDA);
  Lengths lengths({1, 1}, {5, 9});
  QuireAttentionPlan* plan = nullptr;
  const auto error = [&](int32_t max_total_q, QuireAttentionPlan** result) {
    CHECK(quire_attention_plan_on_device(model.attention, &lengths.batch, max_total_q, nullptr,
                                         result) == QUIRE_INVALID_ARGUMENT);
    CHECK(plan == nullptr);
    return std::string(quire_last_error());
  };
  CHECK(error(2, nullptr) == "quire_attention_plan_on_device: plan: expected a pointer, got NULL");
  CHECK(error(-1, &plan).find("max_total_q of at least 0") != std::string::npos);
  CHECK(error(1 << 30, &plan).find("plan: max_total_q: expected a batch of at most") == 0);
  lengths.batch.cu_seqlens_q = nullptr;
  CHECK(error(3, &plan) ==
        "plan: max_total_q: expected 2 (batch_size) without cu_seqlens_q, got 3");
  lengths.batch.seq_lens = nullptr;
  CHECK(error(2, &plan) == "plan: seq_lens: expected [2], got a null one");
}

}  // namespace
