// SPDX-License-Identifier: Apache-2.0
// The inputs of the golden vectors, the same wherever they are made.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/golden/probes.h"

namespace quire::device::golden {

// splitmix64
inline uint32_t draw(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return static_cast<uint32_t>((z ^ z >> 31) >> 32);
}

inline uint32_t draw_word(Input input, int index, uint64_t& state) {
  // Zeros, infinities, NaN, subnormals, ties of both 16-bit types.
  static constexpr uint32_t kSpecial[] = {0,          0x80000000, 0x7F800000, 0xFF800000,
                                          0x7FC00000, 0x00000001, 0x3F808000, 0x3F801000,
                                          0x477FF000, 0x33000000, 0x7F7FFFFF, 0xC2FC0000};
  const uint32_t bits = draw(state);
  switch (input) {
    case Input::kFloats:  // of exponents around 0; a sixth are special
      if (index % 6 == 0) return kSpecial[bits % 12];
      return (bits & 0x807FFFFFu) | (112 + bits / 8 % 24) << 23;
    case Input::kFloat16s:
      return (bits & 0x83FF83FFu) | (10 + bits % 8) << 10 | (10 + bits / 8 % 8) << 26;
    case Input::kBFloat16s:
      return (bits & 0x807F807Fu) | (122 + bits % 8) << 7 | (122 + bits / 8 % 8) << 23;
    case Input::kBits:
      return bits;
  }
  return 0;
}

// [32][kWords] of one case.
inline std::vector<uint32_t> make_input(Input input, int probe, int index) {
  uint64_t state = static_cast<uint64_t>(probe) << 32 | static_cast<uint32_t>(index);
  std::vector<uint32_t> words(kWarpSize * kWords);
  for (int i = 0; i < kWarpSize * kWords; ++i) words[i] = draw_word(input, i + index, state);
  return words;
}

}  // namespace quire::device::golden
