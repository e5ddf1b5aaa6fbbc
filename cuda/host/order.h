// SPDX-License-Identifier: Apache-2.0
// In which order blocks shall come to work items that they ask for one by one. Pure; no bit of a
// result depends on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "quire/kernel_params.h"

namespace quire::cuda {

// What an L2 cache is trusted to keep of K and V while blocks read them.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

// `items` come longest first. They are walked in sections: those of one have K and V of few enough
// kv heads that the L2 cache keeps them, so that they come from memory once. Within a section it
// stays longest first; sections begin with those that have the longest items.
inline void walk_in_sections(std::vector<WorkItem>::iterator begin,
                             std::vector<WorkItem>::iterator end,
                             const std::vector<Sequence>& sequences, int num_kv_heads,
                             int64_t bytes_a_key) {
  std::vector<int32_t> sections(sequences.size() * num_kv_heads, -1);  // [sequence, kv head]
  const auto section_of = [&](const WorkItem& item) -> int32_t& {
    return sections[static_cast<size_t>(item.sequence) * num_kv_heads + item.kv_head];
  };
  int32_t section = 0;
  int64_t bytes = 0;
  for (auto item = begin; item != end; ++item) {
    int32_t& own = section_of(*item);
    if (own >= 0) continue;
    const int64_t needs = sequences[item->sequence].seq_len * bytes_a_key;
    if (bytes > 0 && bytes + needs > kSectionBytes) {
      ++section;
      bytes = 0;
    }
    bytes += needs;
    own = section;
  }
  if (section == 0) return;
  std::stable_sort(begin, end, [&](const WorkItem& a, const WorkItem& b) {
    return section_of(a) < section_of(b);
  });
}

}  // namespace quire::cuda
