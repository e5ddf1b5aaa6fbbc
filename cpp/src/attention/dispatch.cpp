// SPDX-License-Identifier: Apache-2.0
// The dispatcher: a description and a machine -> a backend, with the reasons. Pure.
#include "quire/backend.h"

namespace quire {

Dispatch dispatch(const AttentionDesc& desc, const DeviceInfo& device) {
  Dispatch result;
  Backend* backend = backend_of(device.device.type);
  if (!backend) {
    result.candidates.push_back({"cuda", cuda_state()});
    return result;
  }
  result.candidates = backend->candidates(desc, device);
  for (const Candidate& candidate : result.candidates)
    if (candidate.reason.empty()) result.backend = backend;
  return result;
}

std::string Dispatch::explain() const {
  std::string text;
  bool chosen = false;
  for (const Candidate& candidate : candidates) {
    text += candidate.kernel + ": ";
    if (!candidate.reason.empty())
      text += candidate.reason;
    else
      text += chosen ? "usable, but less preferred" : "chosen";
    chosen |= candidate.reason.empty();
    text += "\n";
  }
  return text;
}

}  // namespace quire
