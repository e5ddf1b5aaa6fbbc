// SPDX-License-Identifier: Apache-2.0
#include "quire/event_log.h"

#include <utility>

#include "quire/error.h"

namespace quire {

EventLog::EventLog(int32_t capacity) {
  QUIRE_CHECK_ARG(capacity >= 1, "EventLog: capacity: expected 1 or more, got ", capacity);
  ring_.resize(static_cast<size_t>(capacity));
}

void EventLog::push(CacheEvent event) {
  if (size() == capacity()) {
    ++lost_;
    ++num_lost_;
  }
  event.sequence = ++last_;
  ring_[static_cast<size_t>(last_ % capacity())] = event;
}

int64_t EventLog::take(std::vector<CacheEvent>& events) {
  events.reserve(events.size() + static_cast<size_t>(size()));
  for (int64_t number = taken_ + lost_ + 1; number <= last_; ++number)
    events.push_back(ring_[static_cast<size_t>(number % capacity())]);
  taken_ = last_;
  return std::exchange(lost_, 0);
}

}  // namespace quire
