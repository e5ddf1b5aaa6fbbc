// SPDX-License-Identifier: Apache-2.0
// An inference engine in one file: continuous batching over a paged KV cache that is too small, so
// that it has to preempt. The model is one attention layer over made-up vectors; at the end every
// generated token is checked against plain loops over the whole sequence.
#include <quire/attention.h>
#include <quire/cache_ops.h>
#include <quire/kv_cache_manager.h>
#include <quire/scheduler.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

namespace {

constexpr int kVocab = 97, kHeads = 4, kKvHeads = 2, kDim = 16, kBlockSize = 8, kNumBlocks = 14;

// What a real model has weights for.
enum Kind { kQuery = 1, kKey = 2, kValue = 3, kUnembedding = 4 };
float feature(Kind kind, int token, int position, int i) {
  return 1.5f * std::sin(0.7f * float(kind * token) + 0.05f * float(position) +
                         float(i * (kind + token % 5)));
}

// Rows of `width` floats, one a token, as the projections of a layer make them.
std::vector<float> project(Kind kind, int width, const quire::ScheduledBatch& batch) {
  std::vector<float> rows;
  for (size_t t = 0; t < batch.token_ids.size(); ++t)
    for (int i = 0; i < width; ++i)
      rows.push_back(feature(kind, batch.token_ids[t], batch.step->positions()[t], i));
  return rows;
}

template <class T>
double logit(const T* out, int token) {  // out [kHeads * kDim]
  double sum = 0;
  for (int i = 0; i < kHeads * kDim; ++i) sum += out[i] * feature(kUnembedding, token, 0, i);
  return sum;
}

quire::AttentionDesc describe_model() {
  quire::AttentionDesc desc;
  desc.num_heads = kHeads;
  desc.num_kv_heads = kKvHeads;
  desc.head_dim = kDim;
  desc.dtype = desc.kv_dtype = quire::DType::kFloat32;
  desc.block_size = kBlockSize;
  return desc;
}

class Model {
 public:
  // Computes a batch; returns a token for each entry of batch.sampling.
  std::vector<int32_t> step(const quire::ScheduledBatch& batch) {
    const quire::StepBatch& step = *batch.step;
    const quire::AttentionPlan plan =
        attention_.plan({// once a step
                         .batch_size = step.batch_size(),
                         .seq_lens = step.seq_lens().data(),
                         .cu_seqlens_q = step.cu_seqlens_q().data(),
                         .block_table = step.block_table().data(),
                         .block_table_stride = step.block_table_stride(),
                         .max_blocks = step.max_blocks()});

    const int64_t rows = static_cast<int64_t>(batch.token_ids.size());  // from here on: per layer
    std::vector<float> q = project(kQuery, kHeads * kDim, batch);
    std::vector<float> k = project(kKey, kKvHeads * kDim, batch);
    std::vector<float> v = project(kValue, kKvHeads * kDim, batch);
    std::vector<float> out(q.size());
    quire::append_kv(view(k, {rows, kKvHeads, kDim}), view(v, {rows, kKvHeads, kDim}), k_view(),
                     v_view(), {step.slot_mapping().data(), quire::DType::kInt64, {rows}});
    quire::AttentionTensors tensors;
    tensors.q = view(q, {rows, kHeads, kDim});
    tensors.k = k_view();
    tensors.v = v_view();
    tensors.out = view(out, {rows, kHeads, kDim});
    attention_.run(plan, tensors);

    std::vector<int32_t> sampled;
    for (int32_t row : batch.sampling) sampled.push_back(best(&out[last_row(step, row)]));
    return sampled;
  }

 private:
  static quire::TensorView view(std::vector<float>& data, std::initializer_list<int64_t> shape) {
    return {data.data(), quire::DType::kFloat32, shape};
  }
  quire::TensorView k_view() { return view(k_cache_, {kNumBlocks, kBlockSize, kKvHeads, kDim}); }
  quire::TensorView v_view() { return view(v_cache_, {kNumBlocks, kBlockSize, kKvHeads, kDim}); }

  static size_t last_row(const quire::StepBatch& step, int32_t row) {
    return size_t(step.cu_seqlens_q()[row + 1] - 1) * kHeads * kDim;
  }
  static int32_t best(const float* out) {
    int32_t token = 0;
    for (int32_t t = 1; t < kVocab; ++t)
      if (logit(out, t) > logit(out, token)) token = t;
    return token;
  }

  quire::Attention attention_{describe_model()};
  std::vector<float> k_cache_ = std::vector<float>(kNumBlocks * kBlockSize * kKvHeads * kDim);
  std::vector<float> v_cache_ = k_cache_;
};

// How far the logit of tokens[length] is from the best one after tokens[0 .. length).
double regret(const std::vector<int32_t>& tokens, int length) {
  std::vector<double> out(kHeads * kDim);
  for (int head = 0; head < kHeads; ++head) {
    const int kv = head / (kHeads / kKvHeads) * kDim;  // where the head's part of k and v begins
    double total = 0;
    for (int t = 0; t < length; ++t) {
      double score = 0;
      for (int i = 0; i < kDim; ++i)
        score += double(feature(kQuery, tokens[length - 1], length - 1, head * kDim + i)) *
                 feature(kKey, tokens[t], t, kv + i);
      const double weight = std::exp(score / std::sqrt(double(kDim)));
      total += weight;
      for (int i = 0; i < kDim; ++i)
        out[head * kDim + i] += weight * feature(kValue, tokens[t], t, kv + i);
    }
    for (int i = 0; i < kDim; ++i) out[head * kDim + i] /= total;
  }
  double best = logit(out.data(), 0);
  for (int t = 1; t < kVocab; ++t) best = std::max(best, logit(out.data(), t));
  return best - logit(out.data(), tokens[length]);
}

}  // namespace

int main() {
  quire::KVCacheManager manager(kNumBlocks, kBlockSize);
  quire::Scheduler scheduler(manager, {.max_tokens_per_step = 32});
  Model model;

  std::vector<std::vector<int32_t>> requests(4);
  for (size_t r = 0; r < requests.size(); ++r) {
    for (int t = 0; t < 20; ++t) requests[r].push_back(t);  // all begin alike
    for (size_t t = 0; t < 3 + 4 * r; ++t) requests[r].push_back(int32_t(7 * t + r) % kVocab);
    scheduler.add(requests[r], /*max_new_tokens=*/16);
  }
  const auto prompts = requests;

  while (const quire::ScheduledBatch* batch = scheduler.schedule()) {
    const std::vector<int32_t> sampled = model.step(*batch);
    for (size_t i = 0; i < sampled.size(); ++i)
      requests[batch->request_ids[batch->sampling[i]]].push_back(sampled[i]);
    scheduler.commit(sampled);
  }
  manager.validate();

  double worst = 0;
  size_t num_generated = 0;
  for (size_t r = 0; r < requests.size(); ++r)
    for (size_t t = prompts[r].size(); t < requests[r].size(); ++t, ++num_generated)
      worst = std::max(worst, regret(requests[r], int(t)));
  std::printf("%zu tokens generated, %lld preemptions, %lld prefix tokens found, error %.1e\n",
              num_generated, static_cast<long long>(scheduler.num_preemptions()),
              static_cast<long long>(manager.stats().prefix_hit_tokens), worst);
  const bool is_right = num_generated == 64 && worst < 1e-3 && manager.num_sequences() == 0;
  std::puts(is_right ? "ok" : "WRONG");
  return is_right ? 0 : 1;
}
