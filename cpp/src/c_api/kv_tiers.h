// SPDX-License-Identifier: Apache-2.0
// What the C interfaces of stores and of what they are attached to share.
#pragma once

#include <memory>

#include "c_api/convert.h"
#include "quire/kv_store.h"

struct QuireKVStore {
  std::unique_ptr<quire::KVStore> store;
};

namespace quire::c {

inline QuireChainKey to_c(const ChainKey& key) {
  QuireChainKey c;
  std::copy(key.bytes.begin(), key.bytes.end(), c.bytes);
  return c;
}

inline ChainKey as_key(const char* argument, const QuireChainKey* key) {
  ChainKey result;
  std::copy_n(deref(argument, key).bytes, result.bytes.size(), result.bytes.begin());
  return result;
}

}  // namespace quire::c
