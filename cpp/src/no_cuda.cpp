// SPDX-License-Identifier: Apache-2.0
// The CUDA backend where quire is built without it: the same symbols, no backend.
#include "quire/backend.h"

namespace quire {

Backend* cuda_backend() { return nullptr; }

std::string cuda_state() { return "built without CUDA"; }

}  // namespace quire
