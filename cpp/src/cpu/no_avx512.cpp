// SPDX-License-Identifier: Apache-2.0
// Names without kernels: the tiers of AVX-512 in builds that are run where they are made, on a CPU
// without them.
#include "cpu/kernels.h"

namespace quire::cpu {

const Kernels kAvx512Kernels = {"avx512", nullptr, nullptr, nullptr,
                                nullptr,  nullptr, nullptr, nullptr};
const Kernels kAvx512Bf16Kernels = {"avx512_bf16", nullptr, nullptr, nullptr,
                                    nullptr,       nullptr, nullptr, nullptr};
const Kernels kAvx512AmxKernels = {"avx512_amx", nullptr, nullptr, nullptr,
                                   nullptr,      nullptr, nullptr, nullptr};

}  // namespace quire::cpu
