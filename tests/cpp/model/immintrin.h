// SPDX-License-Identifier: Apache-2.0
// A model of the AVX-512 and AMX instructions that the kernels use, in AVX2: stands in front of the
// compiler's header, so that the tiers' own sources, unchanged, run on machines without AVX-512.
// Each function follows its instruction's definition. Those that take a constant for one purpose
// only (round to nearest, unordered) know no other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include_next <immintrin.h>

#include "cpu/element.h"
#include "cpu/simd.h"

#define QUIRE_MODELLED
#undef QUIRE_TARGET_BEGIN  // of whatever the source asks for
#ifdef __clang__
#define QUIRE_TARGET_BEGIN(features) \
  QUIRE_PRAGMA(clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function))
#else
#define QUIRE_TARGET_BEGIN(features) \
  QUIRE_PRAGMA(GCC push_options) QUIRE_PRAGMA(GCC target("avx2,fma,f16c"))
#endif

// What compilers define as macros.
#undef _mm512_cmp_ps_mask
#undef _mm512_cmpeq_epi16_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_extracti64x4_epi64
#undef _mm512_roundscale_ps
#undef _mm512_setr_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_release
#undef _tile_stored
#undef _tile_zero

QUIRE_TARGET_BEGIN("")
namespace quire::cpu {  // found before the compiler's, which are in no namespace

template <int kSize, class T>
using Lanes [[gnu::vector_size(kSize)]] = T;
using Ints = Lanes<64, int32_t>;
using Words32 = Lanes<64, uint32_t>;
using Shorts = Lanes<64, uint16_t>;
// clang-format off: the second builds on the first
#include "avx512.h"
#include "amx.h"
// clang-format on
}  // namespace quire::cpu
QUIRE_TARGET_END
