// SPDX-License-Identifier: Apache-2.0
// Named lists of integers as a JSON object: what a snapshot consists of.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quire::snapshot {

using Numbers = std::vector<int64_t>;
using Object = std::map<std::string, Numbers>;

std::string to_json(const Object& object);
Object from_json(std::string_view json);  // throws InvalidArgument

// Appends a list: its length and its values.
template <class T>
void put_list(Numbers& out, const T& values) {
  out.push_back(static_cast<int64_t>(values.size()));
  out.insert(out.end(), values.begin(), values.end());
}

// Reads the numbers of one list in order; throws InvalidArgument for what is out of bounds.
class Reader {
 public:
  Reader(const Object& object, const std::string& name);
  bool is_at_end() const { return rest_.empty(); }
  int64_t next(int64_t least = INT64_MIN, int64_t most = INT64_MAX);
  int32_t next_int32(int64_t least = INT32_MIN, int64_t most = INT32_MAX) {
    return static_cast<int32_t>(next(least, most));
  }
  std::vector<int32_t> next_list(int64_t least = INT32_MIN, int64_t most = INT32_MAX);
  std::span<const int64_t> rest() const { return rest_; }
  [[noreturn]] void refuse(const std::string& expected) const;

 private:
  std::string name_;
  std::span<const int64_t> rest_;
};

}  // namespace quire::snapshot
