// SPDX-License-Identifier: Apache-2.0
#include "quire/preemption.h"

#include <limits>

#include "quire/error.h"

namespace quire {

PreemptionEstimate estimate_preemption(int64_t num_tokens, int64_t num_kept, int32_t num_blocks,
                                       const PreemptionCosts& costs) {
  QUIRE_CHECK_ARG(num_kept >= 0 && num_kept <= num_tokens,
                  "estimate_preemption: num_kept: expected 0 to ", num_tokens, ", got ", num_kept);
  QUIRE_CHECK_ARG(num_blocks >= 0, "estimate_preemption: num_blocks: expected 0 or more, got ",
                  num_blocks);
  const double last = static_cast<double>(num_tokens), first = static_cast<double>(num_kept);
  PreemptionEstimate estimate;
  // Token t attends to t keys, itself included: the sum over the computed ones.
  const double num_pairs = (last * (last + 1) - first * (first + 1)) / 2;
  estimate.recompute_seconds =
      (last - first) * costs.seconds_per_token + num_pairs * costs.seconds_per_token_pair;
  const double num_bytes =
      static_cast<double>(num_blocks) * static_cast<double>(costs.bytes_per_block);
  estimate.swap_seconds = costs.bytes_per_second > 0
                              ? 2 * (costs.seconds_per_swap + num_bytes / costs.bytes_per_second)
                              : std::numeric_limits<double>::infinity();
  if (estimate.swap_seconds < estimate.recompute_seconds) estimate.cheaper = Preemption::kSwap;
  return estimate;
}

}  // namespace quire
