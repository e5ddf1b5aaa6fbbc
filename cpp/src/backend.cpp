// SPDX-License-Identifier: Apache-2.0
#include "quire/backend.h"

#include "quire/error.h"

namespace quire {

void Backend::attention_backward(const BackwardParams&) const {
  throw Unsupported(concat("attention_backward: the backend ", name(), " has no kernel for it"));
}

void Backend::run_part(const AttentionPlan&, const AttentionParams&, std::span<std::byte>,
                       int) const {
  throw Unsupported(concat("run_part: not implemented on ", name(), ": only the CPU has parts"));
}

Backend* backend_of(DeviceType type) {
  return type == DeviceType::kCPU ? cpu_backend() : cuda_backend();
}

std::vector<Capability> capabilities() {
  std::vector<Capability> rows;
  for (Backend* backend : {cpu_backend(), cuda_backend()})
    if (backend)
      for (Capability& row : backend->capabilities()) rows.push_back(std::move(row));
  return rows;
}

}  // namespace quire
