// SPDX-License-Identifier: Apache-2.0
// Which instruction sets were compiled, which this CPU can run, and which one is in use.
#pragma once

#include <span>

#include "cpu/kernels.h"

namespace quire::cpu {

struct Tier {
  const Kernels* kernels;
  bool is_supported;  // by this CPU and its operating system
};

// All compiled tiers, best first; the last one runs everywhere.
std::span<const Tier> tiers();

// The best supported tier, or the one that QUIRE_CPU_ISA names. Throws InvalidArgument with the
// list of supported names for any other.
const Kernels& kernels_in_use();

}  // namespace quire::cpu
