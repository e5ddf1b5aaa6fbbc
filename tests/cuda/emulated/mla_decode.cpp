// SPDX-License-Identifier: Apache-2.0
#include "kernels/mla_decode.h"

#include "emulated/bodies.h"
#include "emulated/find_body.h"
#include "kernels/sm90/mla_decode.h"

#undef QUIRE_MLA_DECODE
#define QUIRE_MLA_DECODE(type, head_dim, rows, keys, stages, mode)                           \
  {"mla_decode_" #type "_" #head_dim "_" #rows "_" #keys "_" #stages "_" #mode,              \
   run_body<device::AttentionArgs,                                                           \
            device::mla_decode<device::MlaTraits<device::type, head_dim, rows, keys, stages, \
                                                 device::Mode::mode>>>},

#undef QUIRE_MLA_DECODE_SM90
#define QUIRE_MLA_DECODE_SM90(type, head_dim, rows, keys, stages, mode)                       \
  {"mla_decode_sm90_" #type "_" #head_dim "_" #rows "_" #keys "_" #stages "_" #mode,          \
   run_body<device::BoxedAttentionArgs,                                                       \
            device::mla_decode_sm90<device::Sm90MlaTraits<device::type, head_dim, rows, keys, \
                                                          stages, device::Mode::mode>>>},

namespace quire::cuda {

KernelBody mla_decode_body(const std::string& name) {
  static constexpr NamedBody kBodies[] = {
#include "kernels_built.def"
  };
  return find_body(kBodies, name);
}

}  // namespace quire::cuda
