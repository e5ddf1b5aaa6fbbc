// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace quire {

// Least recently used first. 8 bytes a block; every operation O(1).
class LruPolicy {
 public:
  static constexpr int32_t kNone = -1;

  LruPolicy() : links_(1) {}

  void insert(int32_t block) {
    if (static_cast<size_t>(block) + 2 > links_.size()) links_.resize(block + 2);
    link_last(block + 1);
  }
  void touch(int32_t block) {
    unlink(block + 1);
    link_last(block + 1);
  }
  void remove(int32_t block) { unlink(block + 1); }
  int32_t victim() const { return links_[0].next - 1; }  // kNone: nothing in it

 private:
  struct Link {
    int32_t prev = 0, next = 0;
  };
  void link_last(int32_t at) {
    links_[at] = {links_[0].prev, 0};
    links_[links_[0].prev].next = at;
    links_[0].prev = at;
  }
  void unlink(int32_t at) {
    links_[links_[at].prev].next = links_[at].next;
    links_[links_[at].next].prev = links_[at].prev;
  }

  std::vector<Link> links_;  // a circle through entry 0; entry block + 1 is that of a block
};

}  // namespace quire
