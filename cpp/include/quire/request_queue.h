// SPDX-License-Identifier: Apache-2.0
// RequestQueue: which of the waiting requests comes next.
//
// Higher priorities come first. Of one priority, the tenant that was served least: each token that
// is computed for a tenant counts 1, each that it samples 2 more, and a tenant that comes back
// after a pause starts level with the least served of the others, so that nobody saves up. Of one
// tenant and priority, in the order of arrival. But whoever was overtaken max_overtakes times is
// due, whatever its tenant and priority: so nobody waits for ever.
//
// Requests are known by small numbers (slots), which may be used again. All is deterministic. What
// runs out of memory has changed nothing.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace quire {

class RequestQueue {
 public:
  explicit RequestQueue(int32_t max_overtakes) : max_overtakes_(max_overtakes) {}

  // A new request, waiting.
  void add(int32_t slot, std::string_view tenant, int32_t priority);
  // It waits no longer: it was admitted.
  void pop(int32_t slot);
  // An admitted one waits again, before its equals.
  void push_front(int32_t slot);
  // It waits no longer, and was not admitted either.
  void leave(int32_t slot);
  // It has ended, in either state.
  void remove(int32_t slot);

  bool empty() const { return size_ == 0; }
  int32_t size() const { return size_; }
  int32_t priority(int32_t slot) const { return entries_[slot].priority; }
  const std::string& tenant(int32_t slot) const { return tenant_of(slot).name; }

  // Of the request that comes next and those behind it in its line: the first `count` slots. Alone
  // if it is due. Valid until the next call.
  std::span<const int32_t> next(int32_t count);

  // A tenant's request had `tokens` served, weighted.
  void charge(int32_t slot, int64_t tokens) { tenants_[entries_[slot].tenant].served += tokens; }

 private:
  struct Entry {
    int32_t tenant = -1;
    int32_t priority = 0;
    bool is_waiting = false;
    int64_t due = 0;  // the count of admissions from which on it is due
  };
  struct Tenant {
    std::string name;
    int64_t served = 0;  // weighted tokens
    int32_t num_requests = 0;
    std::map<int32_t, std::deque<int32_t>, std::greater<>> lines;  // waiting slots by priority
  };
  const Tenant& tenant_of(int32_t slot) const { return tenants_[entries_[slot].tenant]; }
  int32_t open_tenant(std::string_view name);
  void close_tenant(int32_t tenant);
  void enter_line(int32_t slot, bool is_first);

  int32_t max_overtakes_;
  int32_t size_ = 0;
  int64_t num_admitted_ = 0;
  std::vector<Entry> entries_;  // by slot
  std::vector<Tenant> tenants_;
  std::vector<int32_t> unused_tenants_;
  std::map<std::string, int32_t, std::less<>> tenants_by_name_;
  std::set<std::pair<int64_t, int32_t>> due_;  // when, and the slot, of all that wait
  std::vector<int32_t> next_;
};

}  // namespace quire
