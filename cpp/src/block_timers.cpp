// SPDX-License-Identifier: Apache-2.0
#include "quire/block_timers.h"

#include "quire/error.h"

namespace quire {

void BlockTimers::set_ttl(int32_t block, double seconds) {
  erase(block);
  ttls_[block] = seconds;
  deadlines_[block] = 0;
  ++num_blocks_;
}

void BlockTimers::start(int32_t block, int64_t deadline) {
  stop(block);
  deadlines_[block] = deadline;
  heap_.push_back(block);
  settle(heap_.size() - 1);
}

void BlockTimers::erase(int32_t block) {
  if (!contains(block)) return;
  stop(block);
  ttls_[block] = kNone;
  --num_blocks_;
}

void BlockTimers::stop(int32_t block) {
  const int32_t place = places_[block];
  if (place < 0) return;
  places_[block] = -1;
  const int32_t last = heap_.back();
  heap_.pop_back();
  if (last == block) return;
  heap_[place] = last;
  settle(place);
}

void BlockTimers::put(size_t place, int32_t block) {
  heap_[place] = block;
  places_[block] = static_cast<int32_t>(place);
}

// Moves what lies at a place up or down to where it belongs.
void BlockTimers::settle(size_t place) {
  const int32_t block = heap_[place];
  for (; place > 0 && is_before(block, heap_[(place - 1) / 2]); place = (place - 1) / 2)
    put(place, heap_[(place - 1) / 2]);
  for (size_t child; (child = 2 * place + 1) < heap_.size(); place = child) {
    if (child + 1 < heap_.size() && is_before(heap_[child + 1], heap_[child])) ++child;
    if (!is_before(heap_[child], block)) break;
    put(place, heap_[child]);
  }
  put(place, block);
}

void BlockTimers::validate() const {
  int32_t count = 0, num_timers = 0;
  for (int32_t block = 0; block < static_cast<int32_t>(ttls_.size()); ++block) {
    count += contains(block);
    if (places_[block] < 0) continue;
    ++num_timers;
    const size_t place = static_cast<size_t>(places_[block]);
    QUIRE_INVARIANT(contains(block) && place < heap_.size() && heap_[place] == block, "block ",
                    block, ": a timer of another");
    QUIRE_INVARIANT(place == 0 || !is_before(block, heap_[(place - 1) / 2]), "block ", block,
                    ": its timer is out of order");
  }
  QUIRE_INVARIANT(count == num_blocks_ && num_timers == static_cast<int32_t>(heap_.size()),
                  "timers: ", num_blocks_, " blocks counted, ", count, " found");
}

}  // namespace quire
