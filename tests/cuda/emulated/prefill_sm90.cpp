// SPDX-License-Identifier: Apache-2.0
#include "kernels/sm90/prefill_e4m3.h"

#include "emulated/bodies.h"
#include "emulated/find_body.h"

#undef QUIRE_PREFILL_SM90
#define QUIRE_PREFILL_SM90(type, head_dim, head_dim_v, rows, keys, stages, mode)                  \
  {"prefill_sm90_" #type "_" #head_dim "_" #head_dim_v "_" #rows "_" #keys "_" #stages "_" #mode, \
   run_body<device::BoxedAttentionArgs,                                                           \
            device::prefill_sm90<device::Sm90PrefillTraits<                                       \
                device::type, head_dim, head_dim_v, rows, keys, stages, device::Mode::mode>>>},

#undef QUIRE_PREFILL_SM90_E4M3
#define QUIRE_PREFILL_SM90_E4M3(type, head_dim, rows, keys, stages, mode)                        \
  {"prefill_sm90_e4m3_" #type "_" #head_dim "_" #rows "_" #keys "_" #stages "_" #mode,           \
   run_body<device::BoxedAttentionArgs,                                                          \
            device::prefill_e4m3_sm90<device::Sm90E4m3Traits<device::type, head_dim, rows, keys, \
                                                             stages, device::Mode::mode>>>},

namespace quire::cuda {

KernelBody prefill_sm90_body(const std::string& name) {
  static constexpr NamedBody kBodies[] = {
#include "kernels_built.def"
  };
  return find_body(kBodies, name);
}

}  // namespace quire::cuda
