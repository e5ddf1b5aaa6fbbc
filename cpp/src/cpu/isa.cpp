// SPDX-License-Identifier: Apache-2.0
// The tiers in order of preference, and the choice of one at first use.
#include "cpu/isa.h"

#include <cstdlib>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "quire/backend.h"
#include "quire/error.h"

namespace quire::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Tier kTiers[] = {
    {&kAvx512Bf16Kernels, has_avx512() && __builtin_cpu_supports("avx512bf16")},
    {&kAvx512Kernels, has_avx512()},
    {&kAvx2Kernels, has_avx2()},
    {&kScalarKernels, true},
};
#elif defined(__aarch64__)
bool has_bf16() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) & HWCAP2_BF16;
#else
  return false;
#endif
}

const Tier kTiers[] = {
    {&kNeonBf16Kernels, has_bf16()},
    {&kNeonKernels, true},
    {&kScalarKernels, true},
};
#else
const Tier kTiers[] = {{&kScalarKernels, true}};
#endif

const Kernels& choose() {
  const char* forced = std::getenv("QUIRE_CPU_ISA");
  const bool is_forced = forced && *forced;
  for (const Tier& tier : kTiers)
    if (tier.is_supported && (!is_forced || std::string(forced) == tier.kernels->isa))
      return *tier.kernels;
  std::string names;
  for (const std::string& name : supported_cpu_isas()) names += (names.empty() ? "" : ", ") + name;
  throw InvalidArgument(
      concat("QUIRE_CPU_ISA: expected one of ", names, " on this CPU, got ", forced));
}

}  // namespace

std::span<const Tier> tiers() { return kTiers; }

const Kernels& kernels_in_use() {
  static const Kernels& kernels = choose();
  return kernels;
}

}  // namespace quire::cpu

namespace quire {

std::string cpu_isa() { return cpu::kernels_in_use().isa; }

std::vector<std::string> supported_cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Tier& tier : cpu::tiers())
    if (tier.is_supported) names.push_back(tier.kernels->isa);
  return names;
}

}  // namespace quire
