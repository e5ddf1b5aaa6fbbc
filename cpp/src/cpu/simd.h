// SPDX-License-Identifier: Apache-2.0
// The vocabulary that kernels are written in. Each instruction set defines it in its own header
// and namespace; attention_kernels.h is then compiled once in each.
//
//   Vec kWidth kRegisters     that many floats; that many of them fit the register file
//   zero() set(x) iota()      all 0; all x; 0, 1, 2, ...
//   in_register(v)            v, not to be loaded anew for each use
//   load(p) load(p, n)        from any element (element.h); the first n elements, then 0
//   load2(p, v)               two vectors, of 2 * kWidth elements: the first half of them and the
//                             second or, with kLoadsPairs<T>, the even ones and the odd ones
//   kLoadUnit<T>              elements are what load() gives times this; 1, or a power of two that
//                             is cheaper to multiply into a scale
//   store(p, v) store(p, v, n)  to float, Float16, BFloat16, rounding to nearest even
//   fma(a, b, c) add sub mul div max   a * b + c ...; max returns b if either is NaN
//   round(x)                  to the nearest integer
//   scale2(x, n)              x * 2^n for integral n in [-127, 127]; 0 for n = -127
//   first(v) sum(v) largest(v)  the first lane; over all lanes
//   lane_sums(v)              of kWidth vectors: their sums, one a lane
//   transpose(v)              of kWidth vectors in place
//   prefetch(p)
//
// Target regions, not compiler flags, switch instruction sets on: a flag would leak into inline
// functions that other files share. Standard headers must be included before a region begins.
#pragma once

#define QUIRE_INLINE inline __attribute__((always_inline))
#define QUIRE_PRAGMA(text) _Pragma(#text)

#ifdef __clang__
#define QUIRE_TARGET_BEGIN(features) \
  QUIRE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define QUIRE_TARGET_END QUIRE_PRAGMA(clang attribute pop)
#else
#define QUIRE_TARGET_BEGIN(features) \
  QUIRE_PRAGMA(GCC push_options) QUIRE_PRAGMA(GCC target(features))
#define QUIRE_TARGET_END QUIRE_PRAGMA(GCC pop_options)
#endif
