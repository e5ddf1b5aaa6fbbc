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

namespace quire::cuda {

KernelBody decode_body(const std::string& name) {
  static constexpr NamedBody kBodies[] = {
#include "kernels_built.def"
  };
  return find_body(kBodies, name);
}

}  // namespace quire::cuda
