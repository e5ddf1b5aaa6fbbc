// SPDX-License-Identifier: Apache-2.0
// A C entry to the CUDA attention kernels on the emulator, so that the numeric suite of
// tests/numeric can run its grid over them: test_numeric_grid.py loads it.
#include <algorithm>
#include <string>
#include <vector>

#include "emulator/run_kernel.h"
#include "kernels/decode.h"
#include "kernels/prefill.h"
#include "quire/attention.h"

namespace quire::emulator {
namespace {

using device::BFloat16;
using device::Float16;
using device::Mode;

// One call, mirrored by a ctypes structure. Tensors may be strided as AttentionParams says.
struct Call {
  AttentionParams params;  // sequences and block_table are filled in here
  const int32_t* seq_lens;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  const int32_t* block_table;
  int32_t batch_size, max_blocks, dense_q, dense_k;
  int32_t is_aligned, use_decode, parallelism, seed;
};

template <class Type, int kHeadDim>
AttentionKernel select(bool use_decode) {
  using Prefill = device::PrefillTraits<Type, kHeadDim, 64, kHeadDim <= 128 ? 64 : 32, Mode::kFull>;
  using Decode = device::DecodeTraits<Type, kHeadDim, 4, 2, Mode::kFull>;
  return use_decode ? bind<Decode>(device::decode<Decode>)
                    : bind<Prefill>(device::prefill<Prefill>);
}

template <class Type>
AttentionKernel select(int head_dim, bool use_decode) {
  return head_dim <= 64    ? select<Type, 64>(use_decode)
         : head_dim <= 128 ? select<Type, 128>(use_decode)
                           : select<Type, 256>(use_decode);
}

AttentionPlan plan_call(const Call& call, int max_rows) {
  const AttentionParams& p = call.params;
  AttentionDesc desc;
  desc.num_heads = p.num_heads;
  desc.num_kv_heads = p.num_kv_heads;
  desc.head_dim = p.head_dim;
  desc.head_dim_v = p.head_dim_v;
  desc.dtype = desc.kv_dtype =
      p.dtype == ElementType::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
  desc.block_size = p.block_size;
  desc.causal = false;  // window_right says it
  desc.window_left = p.window_left;
  desc.window_right = p.window_right;
  AttentionBatch batch;
  batch.batch_size = call.batch_size;
  batch.seq_lens = call.seq_lens;
  batch.cu_seqlens_q = call.cu_seqlens_q;
  batch.cu_seqlens_k = call.cu_seqlens_k;
  batch.block_table = call.block_table;
  batch.block_table_stride = batch.max_blocks = call.max_blocks;
  batch.dense_q = call.dense_q;
  batch.dense_k = call.dense_k;
  return plan(desc, batch, {call.parallelism, max_rows});
}

std::string run(const Call& call) {
  AttentionParams params = call.params;
  const int head_dim = std::max(params.head_dim, params.head_dim_v);
  const bool use_decode = call.use_decode != 0;
  const AttentionKernel kernel = params.dtype == ElementType::kBFloat16
                                     ? select<BFloat16>(head_dim, use_decode)
                                     : select<Float16>(head_dim, use_decode);
  const AttentionPlan plan = plan_call(call, kernel.rows);
  params.sequences = plan.sequences.data();
  params.block_table = params.block_size > 0 ? plan.block_ids.data() : nullptr;
  params.block_table_stride = 1;
  Workspace workspace;
  Options options;
  options.seed = static_cast<uint32_t>(call.seed);
  options.async = static_cast<AsyncMode>(call.seed % 3);
  return run_kernel(kernel, params, plan, call.is_aligned != 0, workspace, options, 3).error;
}

}  // namespace
}  // namespace quire::emulator

// Null, or what the emulator or the planner has to say; valid until the next call.
extern "C" const char* quire_emulator_attention(const quire::emulator::Call* call) {
  static std::string error;
  try {
    error = quire::emulator::run(*call);
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.empty() ? nullptr : error.c_str();
}

// So that a mirror that has fallen behind is noticed.
extern "C" int quire_emulator_call_bytes() { return sizeof(quire::emulator::Call); }
