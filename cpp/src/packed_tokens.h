// SPDX-License-Identifier: Apache-2.0
// Tokens at 20 bits each, as the prefix cache keeps them: ids of every vocabulary up to 2^20.
//
// Per 16 tokens 40 bytes: their low 16 bits, then their high 4 bits, token j and token j + 8 in one
// byte. What remains of a row (r < 16 tokens) is laid out alike with r and (r + 1) / 2.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace quire {

constexpr int32_t kPackedRun = 16;  // tokens
constexpr int32_t kPackedRunBytes = 40;

inline int64_t packed_bytes(int32_t num_tokens) {
  const int32_t rest = num_tokens % kPackedRun;
  return int64_t{num_tokens / kPackedRun} * kPackedRunBytes + 2 * rest + (rest + 1) / 2;
}

inline bool fits_packed(const int32_t* tokens, int32_t num_tokens) {
  uint32_t all = 0;
  for (int32_t i = 0; i < num_tokens; ++i) all |= static_cast<uint32_t>(tokens[i]);
  return all < (1u << 20);
}

#if defined(__SSE2__)
struct PackedRun {
  __m128i low0, low1;  // the low 16 bits of 8 tokens each
  __m128i high;        // the high 16 bits of all, 255 where they are more
};

inline PackedRun load_run(const int32_t* tokens) {
  const auto load = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(tokens + i));
  };
  const auto low = [](__m128i t) { return _mm_srai_epi32(_mm_slli_epi32(t, 16), 16); };
  const auto high = [](__m128i t) { return _mm_srli_epi32(t, 16); };
  const __m128i a = load(0), b = load(4), c = load(8), d = load(12);
  return {_mm_packs_epi32(low(a), low(b)), _mm_packs_epi32(low(c), low(d)),
          _mm_packus_epi16(_mm_packs_epi32(high(a), high(b)), _mm_packs_epi32(high(c), high(d)))};
}
#endif

// One run of `count` tokens; `row` is where it lies. False: some do not fit, the row is worthless.
inline bool pack_run(const int32_t* tokens, int32_t count, uint8_t* row) {
#if defined(__SSE2__)
  if (count == kPackedRun) {
    const PackedRun run = load_run(tokens);
    const auto load = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(tokens + i));
    };
    const __m128i either = _mm_or_si128(load(0), load(4)), other = _mm_or_si128(load(8), load(12));
    const __m128i excess = _mm_srli_epi32(_mm_or_si128(either, other), 20);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row), run.low0);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 16), run.low1);
    const __m128i high = _mm_or_si128(run.high, _mm_slli_epi16(_mm_srli_si128(run.high, 8), 4));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(row + 32), high);
    return _mm_movemask_epi8(_mm_cmpeq_epi32(excess, _mm_setzero_si128())) == 0xffff;
  }
#endif
  const int32_t half = (count + 1) / 2;
  uint8_t* high = row + 2 * count;
  std::memset(high, 0, half);
  for (int32_t i = 0; i < count; ++i) {
    const uint16_t low = static_cast<uint16_t>(tokens[i]);
    std::memcpy(row + 2 * i, &low, 2);
    high[i % half] |= static_cast<uint8_t>((tokens[i] >> 16 & 15) << (i < half ? 0 : 4));
  }
  return fits_packed(tokens, count);
}

inline int32_t unpack_one(const uint8_t* row, int32_t count, int32_t i) {
  const int32_t half = (count + 1) / 2;
  uint16_t low;
  std::memcpy(&low, row + 2 * i, 2);
  return low | (row[2 * count + i % half] >> (i < half ? 0 : 4) & 15) << 16;
}

// How many of the 16 tokens of a run equal `tokens`, up to the first that does not.
inline int32_t equal_run(const uint8_t* row, const int32_t* tokens) {
#if defined(__SSE2__)
  const PackedRun run = load_run(tokens);
  const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  const __m128i low_equal = _mm_packs_epi16(_mm_cmpeq_epi16(load(row), run.low0),
                                            _mm_cmpeq_epi16(load(row + 16), run.low1));
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + 32));
  const __m128i nibble = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(packed, nibble);
  const __m128i second = _mm_and_si128(_mm_srli_epi16(packed, 4), nibble);
  const __m128i high_equal = _mm_cmpeq_epi8(run.high, _mm_unpacklo_epi64(first, second));
  const int equal = _mm_movemask_epi8(_mm_and_si128(low_equal, high_equal));
  return equal == 0xffff ? kPackedRun : __builtin_ctz(~equal);
#else
  uint32_t differs = 0;  // a loop without an exit, for the vectoriser
  for (int32_t i = 0; i < kPackedRun; ++i)
    differs |= static_cast<uint32_t>(unpack_one(row, kPackedRun, i) ^ tokens[i]);
  if (differs == 0) return kPackedRun;
  int32_t i = 0;
  while (unpack_one(row, kPackedRun, i) == tokens[i]) ++i;
  return i;
#endif
}

// Whether all 16 do: half the work of telling how many.
inline bool is_equal_run(const uint8_t* row, const int32_t* tokens) {
#if defined(__SSE2__)
  const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  const __m128i zero = _mm_setzero_si128(), nibble = _mm_set1_epi8(15);
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + 32));
  __m128i differs = zero;
  for (int half = 0; half < 2; ++half) {  // 8 tokens each
    const __m128i bits = _mm_and_si128(half == 0 ? packed : _mm_srli_epi16(packed, 4), nibble);
    const __m128i low = load(row + 16 * half), high = _mm_unpacklo_epi8(bits, zero);
    const int32_t* const own = tokens + 8 * half;
    differs = _mm_or_si128(differs, _mm_xor_si128(_mm_unpacklo_epi16(low, high), load(own)));
    differs = _mm_or_si128(differs, _mm_xor_si128(_mm_unpackhi_epi16(low, high), load(own + 4)));
  }
  return _mm_movemask_epi8(_mm_cmpeq_epi8(differs, zero)) == 0xffff;
#else
  return equal_run(row, tokens) == kPackedRun;
#endif
}

// A row of `size` tokens, packed run by run.
class PackedRow {
 public:
  PackedRow(const uint8_t* row, int32_t size) : row_(row), size_(size) {}

  int32_t operator[](int32_t i) const {
    const int32_t run = i / kPackedRun * kPackedRun;
    return unpack_one(at(run), run_size(run), i - run);
  }

  // How many of the first `count` tokens equal `tokens`, up to the first that does not.
  int32_t equal_prefix(const int32_t* tokens, int32_t count) const {
    int32_t i = 0;
    for (; i + kPackedRun <= count; i += kPackedRun) {
      const int32_t equal = equal_run(at(i), tokens + i);
      if (equal < kPackedRun) return i + equal;
    }
    while (i < count && (*this)[i] == tokens[i]) ++i;
    return i;
  }

  // Whether all of them equal `tokens`.
  bool equals(const int32_t* tokens) const {
    int32_t i = 0;
    for (; i + kPackedRun <= size_; i += kPackedRun)
      if (!is_equal_run(at(i), tokens + i)) return false;
    while (i < size_ && (*this)[i] == tokens[i]) ++i;
    return i == size_;
  }

  // The first `count` tokens of a row of `size`. False: some do not fit, the row is worthless.
  static bool pack(const int32_t* tokens, int32_t count, int32_t size, uint8_t* row) {
    bool fits = true;
    for (int32_t run = 0; run < count; run += kPackedRun, row += kPackedRunBytes) {
      const int32_t in_run = size - run < kPackedRun ? size - run : kPackedRun;
      int32_t padded[kPackedRun] = {};
      const bool is_whole = count - run >= in_run;
      if (!is_whole) std::memcpy(padded, tokens + run, sizeof(int32_t) * (count - run));
      fits &= pack_run(is_whole ? tokens + run : padded, in_run, row);
    }
    return fits;
  }

 private:
  const uint8_t* at(int32_t run) const {
    return row_ + int64_t{run / kPackedRun} * kPackedRunBytes;
  }
  int32_t run_size(int32_t run) const {
    return size_ - run < kPackedRun ? size_ - run : kPackedRun;
  }

  const uint8_t* row_;
  int32_t size_;
};

}  // namespace quire
