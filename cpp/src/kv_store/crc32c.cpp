// SPDX-License-Identifier: Apache-2.0
#include "kv_store/crc32c.h"

#include <array>
#include <cstring>

namespace quire {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // bits reversed

// tables[k][b]: what byte b adds to the remainder when k more bytes follow it in its word.
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t value = b;
    for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? kPolynomial : 0);
    tables[0][b] = value;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t b = 0; b < 256; ++b)
      tables[k][b] = tables[k - 1][b] >> 8 ^ tables[0][tables[k - 1][b] & 255];
  return tables;
}();

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(std::span<const std::byte> data) {
  uint64_t crc = UINT32_MAX;
  while (data.size() >= 8) {
    uint64_t word;
    std::memcpy(&word, data.data(), sizeof word);
    crc = __builtin_ia32_crc32di(crc, word);
    data = data.subspan(8);
  }
  uint32_t rest = static_cast<uint32_t>(crc);
  for (std::byte b : data) rest = __builtin_ia32_crc32qi(rest, static_cast<uint8_t>(b));
  return ~rest;
}
#endif

}  // namespace

uint32_t crc32c_portable(std::span<const std::byte> data) {
  uint32_t crc = UINT32_MAX;
  while (data.size() >= 8) {
    uint64_t word;
    std::memcpy(&word, data.data(), sizeof word);
    word ^= crc;
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= kTables[7 - k][word >> (8 * k) & 255];
    data = data.subspan(8);
  }
  for (std::byte b : data) crc = crc >> 8 ^ kTables[0][(crc ^ static_cast<uint8_t>(b)) & 255];
  return ~crc;
}

uint32_t crc32c(std::span<const std::byte> data) {
#if defined(__x86_64__)
  static const bool has_sse42 = __builtin_cpu_supports("sse4.2");
  if (has_sse42) return crc32c_sse42(data);
#endif
  return crc32c_portable(data);
}

}  // namespace quire
