// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace quire {

// Room for `count` more elements, in steps as push_back() takes them: what follows cannot throw.
template <class T>
void reserve_more(std::vector<T>& elements, size_t count) {
  if (elements.capacity() - elements.size() >= count) return;
  elements.reserve(std::max(elements.size() + count, 2 * elements.capacity()));
}

}  // namespace quire
