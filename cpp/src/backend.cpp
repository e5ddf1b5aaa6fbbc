// SPDX-License-Identifier: Apache-2.0
#include "quire/backend.h"

namespace quire {

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
