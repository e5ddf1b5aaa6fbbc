// SPDX-License-Identifier: Apache-2.0
// The input is the calls of a log, behind a good beginning: replay() may find differences, but
// must neither crash nor leave the manager inconsistent.
#include <cstddef>
#include <sstream>

#include "quire/call_log.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::ostringstream out;
  quire::KVCacheOptions options;
  options.eviction = size % 7 == 0 ? quire::Eviction::kReuseLru : quire::Eviction::kLru;
  if (size % 5 == 0)
    options.groups = {{}, {quire::LayerGroup::Kind::kSlidingWindow, 6}};
  else
    options.num_host_blocks = 6;
  quire::CallLogWriter(out, {16, 4, size % 2 == 0, static_cast<int32_t>(size % 3), options});
  const std::string log = out.str() + std::string(reinterpret_cast<const char*>(data), size);
  quire::replay(std::as_bytes(std::span(log)));
  return 0;
}
