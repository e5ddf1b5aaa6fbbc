// SPDX-License-Identifier: Apache-2.0
#include "kernels/cache_ops.h"
#include "kernels/plan.h"

#include "emulated/bodies.h"
#include "emulated/find_body.h"

#undef QUIRE_APPEND_KV
#undef QUIRE_APPEND_KV_E4M3
#define QUIRE_APPEND_KV_E4M3(type, threads) \
  {"append_kv_e4m3_" #type "_" #threads,    \
   run_body<device::AppendArgs, device::append_kv_e4m3<device::type, threads>>},
#undef QUIRE_COPY_BLOCKS
#undef QUIRE_MERGE_STATES
#undef QUIRE_PLAN
#define QUIRE_APPEND_KV(type, threads) \
  {"append_kv_" #type "_" #threads,    \
   run_body<device::AppendArgs, device::append_kv<device::type, threads>>},
#define QUIRE_COPY_BLOCKS(threads) \
  {"copy_blocks_" #threads, run_body<device::CopyBlocksArgs, device::copy_blocks<threads>>},
#define QUIRE_MERGE_STATES(type, threads) \
  {"merge_states_" #type "_" #threads,    \
   run_body<device::MergeStatesArgs, device::merge_states<device::type, threads>>},
#define QUIRE_PLAN(threads) \
  {"plan_" #threads, run_body<device::PlanArgs, device::plan<device::PlannerTraits<threads>>>},

namespace quire::cuda {

KernelBody cache_op_body(const std::string& name) {
  static constexpr NamedBody kBodies[] = {
#include "kernels_built.def"
  };
  return find_body(kBodies, name);
}

}  // namespace quire::cuda
