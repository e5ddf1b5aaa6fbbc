// SPDX-License-Identifier: Apache-2.0
// SHA-256 with the SHA extensions of x86; compiled for them, called only where the CPU has them.
#include <immintrin.h>

#include "sha256.h"

namespace quire::sha256 {

// The instructions want the state as (A, B, E, F) and (C, D, G, H), and take four rounds' message
// words with their constants added, two rounds an instruction.
void compress_sha_ni(const uint8_t* data, size_t num_chunks, uint32_t state[8]) {
  const __m128i swap_bytes = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const __m128i* constants = reinterpret_cast<const __m128i*>(kRoundConstants);
  __m128i abef = _mm_setr_epi32(state[5], state[4], state[1], state[0]);
  __m128i cdgh = _mm_setr_epi32(state[7], state[6], state[3], state[2]);
  for (; num_chunks > 0; --num_chunks, data += kChunk) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];  // the latest 16 words of the message schedule
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __m128i& next = w[i % 4];
      if (i < 4) {
        next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i);
        next = _mm_shuffle_epi8(next, swap_bytes);
      } else {
        const __m128i last = w[(i + 3) % 4];
        next = _mm_sha256msg1_epu32(next, w[(i + 1) % 4]);
        next = _mm_add_epi32(next, _mm_alignr_epi8(last, w[(i + 2) % 4], 4));
        next = _mm_sha256msg2_epu32(next, last);
      }
      const __m128i input = _mm_add_epi32(next, _mm_loadu_si128(constants + i));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, input);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(input, 0x0e));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1b);
  const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xb1);
  __m128i* out = reinterpret_cast<__m128i*>(state);
  _mm_storeu_si128(out, _mm_blend_epi16(feba, dchg, 0xf0));
  _mm_storeu_si128(out + 1, _mm_alignr_epi8(dchg, feba, 8));
}

}  // namespace quire::sha256
