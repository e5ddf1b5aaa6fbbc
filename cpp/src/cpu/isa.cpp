// SPDX-License-Identifier: Apache-2.0
// The tiers in order of preference, and the choice of one at first use.
#include "cpu/isa.h"

#include <cstdlib>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "quire/backend.h"
#include "quire/error.h"

namespace quire::cpu {
namespace {

#if defined(__x86_64__)
// For what not every compiler's __builtin_cpu_supports knows.
struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Cpuid(unsigned leaf) { __get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx); }
};

bool has_avx2() {
  constexpr unsigned kF16c = 1u << 29;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (Cpuid(1).ecx & kF16c);
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The state of tiles is large: Linux keeps it only for processes that ask.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
bool has_amx() {
  constexpr unsigned kBf16AndTile = 1u << 22 | 1u << 24;
  return (Cpuid(7).edx & kBf16AndTile) == kBf16AndTile && may_use_tiles();
}

std::vector<Tier> find_tiers() {
  return {
      {&kAvx512AmxKernels, has_avx512_bf16() && has_amx()},
      {&kAvx512Bf16Kernels, has_avx512_bf16()},
      {&kAvx512Kernels, has_avx512()},
      {&kAvx2Kernels, has_avx2()},
      {&kScalarKernels, true},
  };
}
#elif defined(__aarch64__)
bool has_bf16() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) & HWCAP2_BF16;
#else
  return false;
#endif
}

std::vector<Tier> find_tiers() {
  return {{&kNeonBf16Kernels, has_bf16()}, {&kNeonKernels, true}, {&kScalarKernels, true}};
}
#else
std::vector<Tier> find_tiers() { return {{&kScalarKernels, true}}; }
#endif

const Kernels& choose() {
  const char* forced = std::getenv("QUIRE_CPU_ISA");
  const bool is_forced = forced && *forced;
  for (const Tier& tier : tiers())
    if (tier.is_supported && (!is_forced || std::string(forced) == tier.kernels->isa))
      return *tier.kernels;
  std::string names;
  for (const std::string& name : supported_cpu_isas()) names += (names.empty() ? "" : ", ") + name;
  throw InvalidArgument(
      concat("QUIRE_CPU_ISA: expected one of ", names, " on this CPU, got ", forced));
}

}  // namespace

std::span<const Tier> tiers() {
  static const std::vector<Tier> found = find_tiers();
  return found;
}

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
