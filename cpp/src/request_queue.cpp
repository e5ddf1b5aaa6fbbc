// SPDX-License-Identifier: Apache-2.0
#include "quire/request_queue.h"

#include <algorithm>
#include <new>

#include "reserve_more.h"

namespace quire {

int32_t RequestQueue::open_tenant(std::string_view name) {
  const auto found = tenants_by_name_.find(name);
  if (found != tenants_by_name_.end()) return found->second;
  if (unused_tenants_.empty()) {
    reserve_more(tenants_, 1);
    unused_tenants_.reserve(tenants_.capacity());  // close_tenant() must not throw
    unused_tenants_.push_back(static_cast<int32_t>(tenants_.size()));
    tenants_.emplace_back();
  }
  const int32_t tenant = unused_tenants_.back();
  int64_t least = INT64_MAX;
  for (const auto& [other_name, other] : tenants_by_name_)
    least = std::min(least, tenants_[other].served);
  tenants_[tenant].name = name;
  tenants_[tenant].served = least == INT64_MAX ? 0 : least;
  tenants_by_name_.emplace(name, tenant);
  unused_tenants_.pop_back();
  return tenant;
}

// A tenant without requests is forgotten: it comes back level with the least served.
void RequestQueue::close_tenant(int32_t tenant) {
  if (--tenants_[tenant].num_requests > 0) return;
  tenants_by_name_.erase(tenants_[tenant].name);
  tenants_[tenant] = Tenant{};
  unused_tenants_.push_back(tenant);
}

void RequestQueue::add(int32_t slot, std::string_view tenant, int32_t priority) {
  if (static_cast<size_t>(slot) >= entries_.size()) entries_.resize(static_cast<size_t>(slot) + 1);
  reserve_more(next_, 1);  // so that next(1) does not throw
  const int32_t index = open_tenant(tenant);
  ++tenants_[index].num_requests;
  entries_[slot] = {index, priority, false, num_admitted_ + size_ + max_overtakes_};
  try {
    enter_line(slot, false);
  } catch (const std::bad_alloc&) {
    remove(slot);
    throw;
  }
}

void RequestQueue::enter_line(int32_t slot, bool is_first) {
  Entry& entry = entries_[slot];
  const auto due = due_.emplace(entry.due, slot).first;
  auto& lines = tenants_[entry.tenant].lines;
  try {
    std::deque<int32_t>& line = lines[entry.priority];
    line.insert(is_first ? line.begin() : line.end(), slot);
  } catch (const std::bad_alloc&) {
    const auto line = lines.find(entry.priority);
    if (line != lines.end() && line->second.empty()) lines.erase(line);
    due_.erase(due);
    throw;
  }
  entry.is_waiting = true;
  ++size_;
}

void RequestQueue::leave(int32_t slot) {
  Entry& entry = entries_[slot];
  auto& lines = tenants_[entry.tenant].lines;
  const auto line = lines.find(entry.priority);
  line->second.erase(std::find(line->second.begin(), line->second.end(), slot));
  if (line->second.empty()) lines.erase(line);
  due_.erase({entry.due, slot});
  entry.is_waiting = false;
  --size_;
}

void RequestQueue::pop(int32_t slot) {
  leave(slot);
  ++num_admitted_;
}

void RequestQueue::push_front(int32_t slot) {
  entries_[slot].due = num_admitted_ + max_overtakes_;
  enter_line(slot, true);
}

void RequestQueue::remove(int32_t slot) {
  if (entries_[slot].is_waiting) leave(slot);
  close_tenant(entries_[slot].tenant);
  entries_[slot] = Entry{};
}

std::span<const int32_t> RequestQueue::next(int32_t count) {
  next_.clear();
  if (size_ > 0 && num_admitted_ >= due_.begin()->first) {
    next_.push_back(due_.begin()->second);
    return next_;
  }
  const Tenant* best = nullptr;
  for (const auto& [name, index] : tenants_by_name_) {
    const Tenant& tenant = tenants_[index];
    if (tenant.lines.empty()) continue;
    const int32_t priority = tenant.lines.begin()->first;
    const int32_t best_priority = best ? best->lines.begin()->first : 0;
    if (!best || priority > best_priority ||
        (priority == best_priority && tenant.served < best->served))
      best = &tenant;
  }
  if (!best) return {};
  const std::deque<int32_t>& line = best->lines.begin()->second;
  const size_t size = std::min(line.size(), static_cast<size_t>(count));
  next_.assign(line.begin(), line.begin() + static_cast<int64_t>(size));
  return next_;
}

}  // namespace quire
