// SPDX-License-Identifier: Apache-2.0
#include "host/arch.h"

#include <cstdlib>
#include <sstream>

namespace quire::cuda {
namespace {

int number_of(const std::string& isa) {  // "sm_90" -> 90
  return isa.rfind("sm_", 0) == 0 ? std::atoi(isa.c_str() + 3) : 0;
}

}  // namespace

std::string serving_arch(const std::string& archs, const std::string& isa) {
  const int device = number_of(isa);
  std::istringstream names(archs);
  std::string best;
  for (std::string name; names >> name;) {
    const int arch = std::atoi(name.c_str());
    const bool is_exact_only = name.back() < '0' || name.back() > '9';
    const bool runs = is_exact_only ? arch == device : arch / 10 == device / 10 && arch <= device;
    if (runs && (best.empty() || arch >= std::atoi(best.c_str()))) best = name;
  }
  return best;
}

int shared_bytes_per_block(const std::string& isa) {
  return shared_bytes_per_multiprocessor(isa) - 1024;  // a KiB a block is the system's
}

int shared_bytes_per_multiprocessor(const std::string& isa) {
  const int device = number_of(isa);
  if (device == 80 || device == 87) return 164 << 10;
  if (device / 10 == 9 || device / 10 == 10 || device / 10 == 11) return 228 << 10;
  return 100 << 10;
}

std::string list_of(const std::string& archs) {
  std::istringstream names(archs);
  std::string text;
  for (std::string name; names >> name;) text += (text.empty() ? "sm_" : ", sm_") + name;
  return text;
}

}  // namespace quire::cuda
