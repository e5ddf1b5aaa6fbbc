// SPDX-License-Identifier: Apache-2.0
#include "kernels/prefill.h"

#include "emulated/bodies.h"
#include "emulated/find_body.h"

#undef QUIRE_PREFILL
#define QUIRE_PREFILL(type, head_dim, rows, keys, mode)                   \
  {"prefill_" #type "_" #head_dim "_" #rows "_" #keys "_" #mode,          \
   run_body<device::AttentionArgs, device::prefill<device::PrefillTraits< \
                                       device::type, head_dim, rows, keys, device::Mode::mode>>>},

#undef QUIRE_PREFILL_E4M3
#define QUIRE_PREFILL_E4M3(type, head_dim, rows, keys, mode)                          \
  {"prefill_e4m3_" #type "_" #head_dim "_" #rows "_" #keys "_" #mode,                 \
   run_body<device::AttentionArgs,                                                    \
            device::prefill<device::PrefillTraits<device::type, head_dim, rows, keys, \
                                                  device::Mode::mode, device::Float8E4M3>>>},

namespace quire::cuda {

KernelBody prefill_body(const std::string& name) {
  static constexpr NamedBody kBodies[] = {
#include "kernels_built.def"
  };
  return find_body(kBodies, name);
}

}  // namespace quire::cuda
