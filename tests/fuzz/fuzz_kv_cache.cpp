// SPDX-License-Identifier: Apache-2.0
// The input is a shape and then calls of a KVCacheManager; it is validated after each, and saved at
// the end.
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "kv_traffic.h"

namespace {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
  bool is_empty() const { return at_ == end_; }
  uint32_t next() { return is_empty() ? 0 : *at_++; }

 private:
  const uint8_t *at_, *end_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const auto pick = [&](uint32_t bound) { return static_cast<int32_t>(bytes.next() % bound); };
  const kv_traffic::Shape shape{
      .num_blocks = 1 + pick(40),
      .block_size = 1 + pick(8),
      .prefix_caching = pick(4) > 0,
      .async_depth = pick(3),
      .max_seqs = 8,
      .max_tokens = 64,
  };
  quire::KVCacheOptions options;
  options.eviction = pick(2) ? quire::Eviction::kReuseLru : quire::Eviction::kLru;
  options.event_capacity = pick(2) * 16;
  options.num_host_blocks = pick(8);
  // Now and then more layer groups than the first, of any kind.
  options.groups.resize(1);
  for (int32_t n = std::max(0, pick(5) - 1); n > 0; --n) {
    const auto kind = static_cast<quire::LayerGroup::Kind>(pick(4));
    const bool has_size = kind == quire::LayerGroup::Kind::kSlidingWindow ||
                          kind == quire::LayerGroup::Kind::kChunkedLocal;
    options.groups.push_back({kind, has_size ? 1 + pick(16) : 0});
  }
  quire::KVCacheManager manager(shape.num_blocks, shape.block_size, shape.prefix_caching,
                                shape.async_depth, options);
  kv_traffic::Traffic traffic(manager, manager, shape, bytes);
  while (!bytes.is_empty()) {
    traffic.call();
    manager.validate();
  }
  const std::string saved = manager.snapshot();
  quire::KVCacheManager restored = quire::KVCacheManager::restore(saved);
  restored.validate();
  if (kv_traffic::without_times(restored.snapshot()) != kv_traffic::without_times(saved))
    throw quire::InvariantError("a snapshot did not come back as it was");
  traffic.free_all();
  manager.validate();
  if (manager.stats().used_blocks != 0) throw quire::InvariantError("a block leaked");
  return 0;
}
