// SPDX-License-Identifier: Apache-2.0
// Copies of rows and blocks, and the merge of partial results: bound by memory, so plain C++. What
// is not, quantising, is done by the kernels in use.
#include "cpu/cache_ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/element.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {
namespace {

// Work that is too small to wake a thread for, in bytes and in elements.
constexpr int64_t kBytesAPiece = 256 << 10;
constexpr int64_t kElementsAPiece = 32 << 10;

// f(i) for i in [0, count), `a_piece` of them at a time.
template <class F>
void for_each(int64_t count, int64_t a_piece, F f) {
  a_piece = std::max<int64_t>(1, a_piece);
  parallel_for((count + a_piece - 1) / a_piece, [&](int64_t piece) {
    const int64_t end = std::min(count, (piece + 1) * a_piece);
    for (int64_t i = piece * a_piece; i < end; ++i) f(i);
  });
}

// Element offset of a slot in a cache.
int64_t slot_offset(const TensorView& cache, int64_t slot) {
  const int64_t block_size = cache.shape[1];
  return slot / block_size * cache.strides[0] + slot % block_size * cache.strides[1];
}

// Turns the `half` pairs from[i * kStep] and from[i * kStep + apart]. `to` may be `from`: a run of
// pairs is read before it is written, which also lets both loops be vectorised.
template <class T, class U, int64_t kStep>
void rotate_pairs(const T* from, const float* cos, const float* sin, int64_t half, U* to) {
  constexpr int64_t kRun = 64;
  const int64_t apart = kStep == 2 ? 1 : half;
  float x[kRun], y[kRun];
  for (int64_t begin = 0; begin < half; begin += kRun) {
    const int64_t count = std::min(kRun, half - begin), first = begin * kStep;
    for (int64_t i = 0; i < count; ++i) {
      x[i] = to_float(from[first + i * kStep]);
      y[i] = to_float(from[first + i * kStep + apart]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float c = cos[begin + i], s = sin[begin + i];
      from_float(x[i] * c - y[i] * s, to[first + i * kStep]);
      from_float(y[i] * c + x[i] * s, to[first + i * kStep + apart]);
    }
  }
}

// A head of token t; `to` may be `from`.
template <class T, class U>
void rotate_head(const T* from, const Rope& rope, int64_t t, int64_t dim, U* to) {
  const int64_t rotary_dim = rope.cos_sin.shape[1], half = rotary_dim / 2;
  const int32_t position = rope.positions.as<int32_t>()[t * rope.positions.strides[0]];
  const float* cos = rope.cos_sin.as<float>() + position * rope.cos_sin.strides[0];
  const auto rotate = rope.interleaved ? rotate_pairs<T, U, 2> : rotate_pairs<T, U, 1>;
  rotate(from, cos, cos + half, half, to);
  if constexpr (std::is_same_v<T, U>) {
    if (to != from) std::copy(from + rotary_dim, from + dim, to + rotary_dim);
  } else {
    for (int64_t d = rotary_dim; d < dim; ++d) to[d] = to_float(from[d]);
  }
}

// All heads of token t, `to_stride` elements apart where they are written.
template <class T>
void rotate_token(const TensorView& rows, const Rope& rope, int64_t t, T* to, int64_t to_stride) {
  for (int64_t head = 0; head < rows.shape[1]; ++head, to += to_stride) {
    const T* from = rows.as<T>() + t * rows.strides[0] + head * rows.strides[1];
    rotate_head(from, rope, t, rows.shape[2], to);
  }
}

// f.operator()<T>(), T being the element type of a float dtype.
template <class F>
void for_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f.template operator()<float>();
  if (dtype == DType::kFloat16) return f.template operator()<Float16>();
  f.template operator()<BFloat16>();
}

// The same for the element type of a quantised cache.
template <class F>
void for_quantised(DType dtype, F f) {
  if (dtype == DType::kFloat8E4M3) return f.template operator()<Float8E4M3>();
  if (dtype == DType::kFloat8E5M2) return f.template operator()<Float8E5M2>();
  f.template operator()<Int8>();
}

// The scale that makes the largest of a row's magnitudes `largest`. NaN does not count, infinity is
// taken for the largest float; a row of zeros gets a normal number too.
float scale_of_row(const float* row, int64_t dim, float largest) {
  constexpr int32_t kInfinity = 0x7f800000;
  int32_t top = 0;  // floats without their signs are ordered like integers
  for (int64_t d = 0; d < dim; ++d) {
    const int32_t magnitude = std::bit_cast<int32_t>(row[d]) & 0x7fffffff;
    const int32_t counted = magnitude > kInfinity ? 0 : magnitude;
    top = counted > top ? counted : top;
  }
  const float finite = std::bit_cast<float>(std::min(top, kInfinity - 1));
  return std::max(finite / largest, std::numeric_limits<float>::min());
}

// Where the scale of a slot and head lies.
const float* scale_of_slot(const KvScale& scale, int64_t slot, int64_t block_size, int64_t head) {
  if (!scale.values) return &scale.value;
  return scale.values + slot / block_size * scale.stride_block +
         slot % block_size * scale.stride_row + head * scale.stride_head;
}

// All heads of token t to a slot of a quantised cache.
template <class T, class Q>
void quantise_token(const Kernels& kernels, const TensorView& rows, const TensorView& cache,
                    int64_t t, int64_t slot, const Rope* rope, const KvScale& scale) {
  const int64_t dim = rows.shape[2];
  float* row = thread_scratch(dim);
  for (int64_t head = 0; head < rows.shape[1]; ++head) {
    const T* from = rows.as<T>() + t * rows.strides[0] + head * rows.strides[1];
    if (rope)
      rotate_head(from, *rope, t, dim, row);
    else
      for (int64_t d = 0; d < dim; ++d) row[d] = to_float(from[d]);
    const float* given = scale_of_slot(scale, slot, cache.shape[1], head);
    if (scale.is_per_token) *const_cast<float*>(given) = scale_of_row(row, dim, Q::kLargest);
    kernels.quantise(row, dim, *given, element_type(cache.dtype),
                     cache.as<Q>() + slot_offset(cache, slot) + head * cache.strides[2]);
  }
}

template <class T>
void merge_row(const TensorView& outs, const TensorView& lses, const TensorView& out,
               const TensorView& lse, int64_t row, int64_t head) {
  const int64_t num_states = outs.shape[0], dim = outs.shape[3];
  const auto lse_of = [&](int64_t n) {
    return lses.as<float>()[n * lses.strides[0] + head * lses.strides[1] + row * lses.strides[2]];
  };
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float top = -kInfinity;
  for (int64_t n = 0; n < num_states; ++n) top = std::max(top, lse_of(n));
  float sum = 0;
  float* values = thread_scratch(dim);
  std::fill_n(values, dim, 0.0f);
  for (int64_t n = 0; n < num_states; ++n) {
    if (lse_of(n) == -kInfinity) continue;
    const float weight = std::exp(lse_of(n) - top);
    const T* from =
        outs.as<T>() + n * outs.strides[0] + row * outs.strides[1] + head * outs.strides[2];
    sum += weight;
    for (int64_t d = 0; d < dim; ++d) values[d] += weight * to_float(from[d]);
  }
  const bool is_empty = sum == 0;  // not so where a state is NaN: that is not to be lost
  T* to = out.as<T>() + row * out.strides[0] + head * out.strides[1];
  for (int64_t d = 0; d < dim; ++d) from_float(is_empty ? 0.0f : values[d] / sum, to[d]);
  if (lse)
    lse.as<float>()[head * lse.strides[0] + row * lse.strides[1]] =
        is_empty ? -kInfinity : top + std::log(sum);
}

}  // namespace

void scatter_rows(const TensorView& rows, const TensorView& cache, const TensorView& slot_mapping) {
  const int64_t element = static_cast<int64_t>(size_of(rows.dtype));
  const int64_t num_heads = rows.shape[1], head_bytes = rows.shape[2] * element;
  for_each(rows.shape[0], kBytesAPiece / std::max<int64_t>(1, num_heads * head_bytes),
           [&](int64_t t) {
             const int64_t slot = slot_mapping.as<int64_t>()[t * slot_mapping.strides[0]];
             if (slot < 0) return;
             const char* from = rows.as<char>() + t * rows.strides[0] * element;
             char* to = cache.as<char>() + slot_offset(cache, slot) * element;
             for (int64_t head = 0; head < num_heads; ++head)
               std::memcpy(to + head * cache.strides[2] * element,
                           from + head * rows.strides[1] * element, head_bytes);
           });
}

void scatter_rotated_rows(const TensorView& rows, const TensorView& cache,
                          const TensorView& slot_mapping, const Rope& rope) {
  for_dtype(rows.dtype, [&]<class T>() {
    for_each(rows.shape[0], kElementsAPiece / std::max<int64_t>(1, rows.shape[1] * rows.shape[2]),
             [&](int64_t t) {
               const int64_t slot = slot_mapping.as<int64_t>()[t * slot_mapping.strides[0]];
               if (slot < 0) return;
               T* to = cache.as<T>() + slot_offset(cache, slot);
               rotate_token<T>(rows, rope, t, to, cache.strides[2]);
             });
  });
}

void quantise_rows(const TensorView& rows, const TensorView& cache, const TensorView& slot_mapping,
                   const Rope* rope, const TensorView& scale) {
  const KvScale kernel = kernel_scale(scale);
  const Kernels& kernels = kernels_in_use();
  for_dtype(rows.dtype, [&]<class T>() {
    for_quantised(cache.dtype, [&]<class Q>() {
      for_each(rows.shape[0], kElementsAPiece / std::max<int64_t>(1, rows.shape[1] * rows.shape[2]),
               [&](int64_t t) {
                 const int64_t slot = slot_mapping.as<int64_t>()[t * slot_mapping.strides[0]];
                 if (slot >= 0) quantise_token<T, Q>(kernels, rows, cache, t, slot, rope, kernel);
               });
    });
  });
}

void rotate_rows(const TensorView& rows, const Rope& rope, const TensorView& out) {
  for_dtype(rows.dtype, [&]<class T>() {
    for_each(rows.shape[0], kElementsAPiece / std::max<int64_t>(1, rows.shape[1] * rows.shape[2]),
             [&](int64_t t) {
               T* to = out.as<T>() + t * out.strides[0];
               rotate_token<T>(rows, rope, t, to, out.strides[1]);
             });
  });
}

void copy_blocks(const TensorView& src, const TensorView& dst, const TensorView& src_dst) {
  const int64_t element = static_cast<int64_t>(size_of(src.dtype));
  const int64_t block_size = src.shape[1], num_heads = src.shape[2];
  const int64_t head_bytes = src.shape[3] * element;
  for_each(
      src_dst.shape[0], kBytesAPiece / std::max<int64_t>(1, block_size * num_heads * head_bytes),
      [&](int64_t i) {
        const int32_t* pair = src_dst.as<int32_t>() + i * src_dst.strides[0];
        for (int64_t t = 0; t < block_size; ++t)
          for (int64_t head = 0; head < num_heads; ++head) {
            const auto address = [&](const TensorView& cache, int32_t block) {
              return cache.as<char>() + element * (block * cache.strides[0] + t * cache.strides[1] +
                                                   head * cache.strides[2]);
            };
            std::memcpy(address(dst, pair[1]), address(src, pair[0]), head_bytes);
          }
      });
}

void merge_states(const TensorView& outs, const TensorView& lses, const TensorView& out,
                  const TensorView& lse) {
  const int64_t num_heads = out.shape[1];
  for_dtype(outs.dtype, [&]<class T>() {
    for_each(out.shape[0] * num_heads,
             kElementsAPiece / std::max<int64_t>(1, outs.shape[0] * outs.shape[3]),
             [&](int64_t i) { merge_row<T>(outs, lses, out, lse, i / num_heads, i % num_heads); });
  });
}

}  // namespace quire::cpu
