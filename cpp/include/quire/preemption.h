// SPDX-License-Identifier: Apache-2.0
// How a request that must give up its blocks gets them back for less: by computing its tokens
// again, or by moving the blocks to host memory and back.
#pragma once

#include <cstdint>

namespace quire {

enum class Preemption : uint8_t { kRecompute, kSwap };

// What a machine and a model cost, measured by whoever knows them.
struct PreemptionCosts {
  double seconds_per_token = 0;       // of prefill, attention apart
  double seconds_per_token_pair = 0;  // of attention: a query and a key
  double bytes_per_second = 0;        // between device and host, one way; 0: no swapping
  double seconds_per_swap = 0;        // once each way
  int64_t bytes_per_block = 0;        // of all layers
};

struct PreemptionEstimate {
  Preemption cheaper = Preemption::kRecompute;
  double recompute_seconds = 0;
  double swap_seconds = 0;  // out and in; infinite where there is no swapping
};

// Of a request with `num_tokens` computed tokens in `num_blocks` blocks of its own, the first
// `num_kept` of which will probably still be cached when it comes back: those are neither computed
// nor moved. A tie is recomputed, which takes no host memory.
PreemptionEstimate estimate_preemption(int64_t num_tokens, int64_t num_kept, int32_t num_blocks,
                                       const PreemptionCosts& costs);

}  // namespace quire
