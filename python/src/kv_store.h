// SPDX-License-Identifier: Apache-2.0
// What the bindings of stores and of the manager share.
#pragma once

#include <memory>

#include "quire/kv_store.h"
#include "tensor.h"

namespace quire::python {

// quire.KVStore. Waits for its requests when it goes, which takes other threads.
struct PyStore {
  std::unique_ptr<KVStore> store;
  ~PyStore() {
    nb::gil_scoped_release unlocked;
    store.reset();
  }
};

inline const char* tier_name(CacheTier tier) {
  static constexpr const char* kNames[] = {"device", "host", "file"};
  return kNames[static_cast<int>(tier)];
}

}  // namespace quire::python
