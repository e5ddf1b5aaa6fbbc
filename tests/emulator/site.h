// SPDX-License-Identifier: Apache-2.0
// Site: the source line that used a primitive, so that a report can name it and a collective can
// check that all of its lanes are at the same one.
#pragma once

#include <cstring>

namespace quire::emulator {

struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  const char* file_name() const {
    const char* slash = std::strrchr(file, '/');
    return slash ? slash + 1 : file;
  }
  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};

}  // namespace quire::emulator
