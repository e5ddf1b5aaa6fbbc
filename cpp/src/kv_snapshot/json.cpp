// SPDX-License-Identifier: Apache-2.0
#include "kv_snapshot/json.h"

#include <charconv>

#include "quire/error.h"

namespace quire::snapshot {
namespace {

class Parser {
 public:
  explicit Parser(std::string_view json) : begin_(json.data()), rest_(json) {}

  Object object() {
    Object object;
    expect('{');
    if (!accept('}')) {
      do {
        std::string name = text();
        expect(':');
        object[name] = numbers();
      } while (accept(','));
      expect('}');
    }
    skip_space();
    if (!rest_.empty()) refuse("the end");
    return object;
  }

 private:
  void skip_space() {
    const size_t count = rest_.find_first_not_of(" \t\r\n");
    rest_.remove_prefix(count == std::string_view::npos ? rest_.size() : count);
  }

  bool accept(char wanted) {
    skip_space();
    if (rest_.empty() || rest_[0] != wanted) return false;
    rest_.remove_prefix(1);
    return true;
  }

  void expect(char wanted) {
    if (!accept(wanted)) refuse(std::string("'") + wanted + "'");
  }

  std::string text() {  // names are plain
    expect('"');
    const size_t count = rest_.find('"');
    if (count == std::string_view::npos) refuse("the end of a name");
    std::string result(rest_.substr(0, count));
    rest_.remove_prefix(count + 1);
    return result;
  }

  Numbers numbers() {
    Numbers result;
    expect('[');
    if (accept(']')) return result;
    do result.push_back(number());
    while (accept(','));
    expect(']');
    return result;
  }

  int64_t number() {
    skip_space();
    int64_t value = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    if (error != std::errc()) refuse("an integer");
    rest_.remove_prefix(static_cast<size_t>(end - rest_.data()));
    return value;
  }

  [[noreturn]] void refuse(const std::string& expected) const {
    throw InvalidArgument(
        concat("restore: snapshot: expected ", expected, " at byte ", rest_.data() - begin_));
  }

  const char* begin_;
  std::string_view rest_;
};

}  // namespace

std::string to_json(const Object& object) {
  std::string json = "{";
  for (const auto& [name, numbers] : object) {
    if (json.size() > 1) json += ",\n";
    json.append("\"").append(name).append("\":[");
    char digits[24];
    for (size_t i = 0; i < numbers.size(); ++i) {
      if (i > 0) json += ',';
      json.append(digits, std::to_chars(digits, std::end(digits), numbers[i]).ptr);
    }
    json += ']';
  }
  return json + "}\n";
}

Object from_json(std::string_view json) { return Parser(json).object(); }

Reader::Reader(const Object& object, const std::string& name) : name_(name) {
  const auto found = object.find(name);
  QUIRE_CHECK_ARG(found != object.end(), "restore: snapshot: expected a list \"", name, "\"");
  rest_ = found->second;
}

int64_t Reader::next(int64_t least, int64_t most) {
  if (rest_.empty()) refuse("more numbers");
  const int64_t value = rest_[0];
  if (value < least || value > most) refuse(concat(least, " to ", most, ", got ", value));
  rest_ = rest_.subspan(1);
  return value;
}

std::vector<int32_t> Reader::next_list(int64_t least, int64_t most) {
  std::vector<int32_t> values(static_cast<size_t>(next(0, static_cast<int64_t>(rest_.size()) - 1)));
  for (int32_t& value : values) value = next_int32(least, most);
  return values;
}

void Reader::refuse(const std::string& expected) const {
  throw InvalidArgument(concat("restore: snapshot: ", name_, ": expected ", expected));
}

}  // namespace quire::snapshot
