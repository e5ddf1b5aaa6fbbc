// SPDX-License-Identifier: Apache-2.0
#include "kernels/decode.h"

#include "emulated/bodies.h"
#include "emulated/find_body.h"

#undef QUIRE_DECODE
#define QUIRE_DECODE(type, head_dim, warps, stages, mode)                              \
  {"decode_" #type "_" #head_dim "_" #warps "_" #stages "_" #mode,                     \
   run_body<device::AttentionArgs,                                                     \
            device::decode<device::DecodeTraits<device::type, head_dim, warps, stages, \
                                                device::Mode::mode>>>},

#undef QUIRE_DECODE_E4M3
#define QUIRE_DECODE_E4M3(type, head_dim, warps, stages, mode)                         \
  {"decode_e4m3_" #type "_" #head_dim "_" #warps "_" #stages "_" #mode,                \
   run_body<device::AttentionArgs,                                                     \
            device::decode<device::DecodeTraits<device::type, head_dim, warps, stages, \
                                                device::Mode::mode, device::Float8E4M3>>>},

namespace quire::cuda {

KernelBody decode_body(const std::string& name) {
  static constexpr NamedBody kBodies[] = {
#include "kernels_built.def"
  };
  return find_body(kBodies, name);
}

}  // namespace quire::cuda
