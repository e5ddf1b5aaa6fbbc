// SPDX-License-Identifier: Apache-2.0
// Decoding sequences that share a prefix, with and without reading it once for all of them. The
// two take turns, over the same blocks; medians of CPU time on one thread, of time on several.
//
//   cmake --build --preset dev --target bench_shared_prefix
//   build-dev/tests/cpp/bench_shared_prefix [threads] [num_heads] [num_kv_heads] [batch] [prefix]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <numeric>
#include <random>
#include <vector>

#include "quire/backend.h"

using namespace quire;

namespace {

constexpr int kDim = 128, kBlock = 16, kOwn = 256, kRounds = 9;

struct Setting {
  int threads = 1, num_heads = 32, num_kv_heads = 8, batch = 32, prefix = 4096;
};

double seconds(int threads) {
  timespec t;
  clock_gettime(threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Elements of about -2 ... 2: any bits would hold NaN.
std::vector<char> random_elements(DType dtype, int64_t count) {
  std::vector<char> bytes(count * size_of(dtype));
  std::minstd_rand rng(1);
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(rng() % 4096) / 1024 - 2;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const auto half = static_cast<uint16_t>(0x3800 | (rng() & 0x83ff));
    const auto brain = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::kFloat32) std::memcpy(&bytes[4 * i], &x, 4);
    if (dtype == DType::kFloat16) std::memcpy(&bytes[2 * i], &half, 2);
    if (dtype == DType::kBFloat16) std::memcpy(&bytes[2 * i], &brain, 2);
  }
  return bytes;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

void compare(const Setting& s, DType dtype) {
  const int shared = s.prefix / kBlock, own = kOwn / kBlock, num_blocks = shared + s.batch * own;
  std::vector<int32_t> ids(num_blocks), table, seq_lens(s.batch, s.prefix + kOwn);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), std::minstd_rand(2));
  for (int b = 0; b < s.batch; ++b) {
    table.insert(table.end(), ids.begin(), ids.begin() + shared);
    const auto first = ids.begin() + shared + b * own;
    table.insert(table.end(), first, first + own);
  }
  AttentionDesc desc{.num_heads = s.num_heads, .num_kv_heads = s.num_kv_heads, .head_dim = kDim};
  desc.dtype = desc.kv_dtype = dtype;
  desc.block_size = kBlock;
  AttentionBatch batch{.batch_size = s.batch, .seq_lens = seq_lens.data()};
  batch.block_table = table.data();
  batch.block_table_stride = batch.max_blocks = shared + own;
  const Attention attention(desc);
  PlanTraits traits = cpu_backend()->plan_traits(attention.desc(), cpu_backend()->device_info(0));
  const AttentionPlan together = plan(attention.desc(), batch, traits);
  traits.sharing = Sharing::kNever;
  const AttentionPlan apart = plan(attention.desc(), batch, traits);

  const int64_t cache_size = int64_t{num_blocks} * s.num_kv_heads * kBlock * kDim;
  std::vector<char> k = random_elements(dtype, cache_size), v = k;
  std::vector<char> q = random_elements(dtype, int64_t{s.batch} * s.num_heads * kDim);
  std::vector<char> outs[2] = {q, q};
  AttentionTensors t;
  t.q = {q.data(), dtype, {s.batch, s.num_heads, kDim}};
  t.k = {k.data(), dtype, {num_blocks, kBlock, s.num_kv_heads, kDim}};
  t.v = {v.data(), dtype, {num_blocks, kBlock, s.num_kv_heads, kDim}};
  for (TensorView* view : {&t.k, &t.v}) {  // head-major
    view->strides[1] = kDim;
    view->strides[2] = kBlock * kDim;
  }
  std::vector<double> times[2];
  for (int round = 0; round <= kRounds; ++round)
    for (int i = 0; i < 2; ++i) {
      t.out = {outs[i].data(), dtype, {s.batch, s.num_heads, kDim}};
      const double start = seconds(s.threads);
      attention.run(i ? together : apart, t);
      if (round > 0) times[i].push_back(seconds(s.threads) - start);
    }
  const double off = median(times[0]), on = median(times[1]);
  std::printf("%-8s  apart %7.2f ms, together %7.2f ms (%5.1f GFLOP/s): %5.2f x, %s bits\n",
              name_of(dtype), 1e3 * off, 1e3 * on, static_cast<double>(together.flops) / on / 1e9,
              off / on, outs[0] == outs[1] ? "the same" : "OTHER");
}

}  // namespace

int main(int argc, char** argv) {
  Setting s;
  int* const fields[] = {&s.threads, &s.num_heads, &s.num_kv_heads, &s.batch, &s.prefix};
  for (int i = 1; i < argc && i <= 5; ++i) *fields[i - 1] = std::atoi(argv[i]);
  set_num_threads(s.threads);
  std::printf("%d sequences, %d shared and %d own tokens, %d/%d heads, %d threads, %s\n", s.batch,
              s.prefix, kOwn, s.num_heads, s.num_kv_heads, s.threads, cpu_isa().c_str());
  for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) compare(s, dtype);
}
