// SPDX-License-Identifier: Apache-2.0
// What the core finds in libquire_cuda.so: see cpp/src/load_cuda.cpp.
#include "backend.h"
#include "host/images.h"

// The backend, or null; `state` is set to one sentence on it.
extern "C" __attribute__((visibility("default"))) quire::Backend* quire_cuda_backend(
    std::string* state) {
  using namespace quire::cuda;
  static auto* driver = new Driver;  // never destroyed: plans may outlive static objects
  static auto* made = new Made;
  if (!made->backend && load_driver(*driver, made->state)) *made = make_backend(*driver, images());
  *state = made->state;
  return made->backend.get();
}
