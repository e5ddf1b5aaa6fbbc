// SPDX-License-Identifier: Apache-2.0
// The compiled kernels as the host knows them: one row a line of kernels.def, made from the same
// traits as the device code.
#pragma once

#include <array>
#include <string_view>

#include "kernels/traits.h"

namespace quire::cuda {

enum class Family : uint8_t { kPrefill, kDecode, kAppend, kCopy, kMerge, kPlan };

struct Kernel {
  const char* name;  // of the entry point
  Family family;
  ElementType dtype;     // of attention's queries, of append and merge
  ElementType kv_dtype;  // of attention's and append's cache
  int head_dim;          // of the tiles; that of the tensors may be less
  int head_dim_v;
  int rows;  // of a tile
  device::Mode mode;
  int threads;
  int shared_bytes;
  int blocks_per_multiprocessor;  // that registers are left for
  const char* arch = nullptr;     // the only one it is compiled for, "90a"; null: all
  int box_rows = 0;               // at most; 0: its only argument is AttentionArgs
  bool takes_tickets = false;     // a block asks for items one by one
  int global_bytes = 0;           // of device memory that a block works in
  int latent_dim = 0;  // > 0: V is the first columns of K, at most so many; a block takes one tile
                       // of rows
};

namespace rows {

using device::BFloat16;
using device::Float16;
using device::Mode;

template <class Type>
constexpr ElementType element() {
  return Type::is_bfloat16 ? ElementType::kBFloat16 : ElementType::kFloat16;
}
template <>
constexpr ElementType element<device::Float8E4M3>() {
  return ElementType::kFloat8E4M3;
}

template <class Traits>
constexpr Kernel attention(const char* name, Family family) {
  return {name,
          family,
          element<typename Traits::Type>(),
          element<typename Traits::KvType>(),
          Traits::kHeadDim,
          Traits::kHeadDim,
          Traits::kRows,
          Traits::kMode,
          Traits::kThreads,
          Traits::kSharedBytes,
          device::blocks_per_multiprocessor(Traits::kThreads)};
}

template <class Traits>
constexpr Kernel sm90_prefill(const char* name, ElementType dtype) {
  Kernel kernel = attention<Traits>(name, Family::kPrefill);
  kernel.dtype = dtype;
  kernel.head_dim = Traits::kKeyDim;
  kernel.arch = "90a";
  kernel.box_rows = Traits::kWarpKeys;
  kernel.takes_tickets = true;
  kernel.global_bytes = Traits::kGlobalBytes;
  return kernel;
}

template <class Traits>
constexpr Kernel planner(const char* name) {
  Kernel kernel = {};
  kernel.name = name;
  kernel.family = Family::kPlan;
  kernel.threads = Traits::kThreads;
  kernel.shared_bytes = Traits::kSharedBytes;
  kernel.blocks_per_multiprocessor = 1;
  return kernel;
}

template <class Traits>
constexpr Kernel mla_decode(const char* name) {
  Kernel kernel =
      attention<Traits>(name, Traits::kRows == device::kTile ? Family::kDecode : Family::kPrefill);
  kernel.latent_dim = Traits::kHeadDimV;
  return kernel;
}

template <class Traits>
constexpr Kernel sm90_mla_decode(const char* name) {
  Kernel kernel = mla_decode<Traits>(name);
  kernel.arch = "90a";
  kernel.box_rows = Traits::kKeys;
  kernel.takes_tickets = true;
  kernel.global_bytes = Traits::kGlobalBytes;
  return kernel;
}

constexpr Kernel cache_op(const char* name, Family family, ElementType dtype, ElementType kv_dtype,
                          int threads) {
  return {name, family, dtype, kv_dtype, 0, 0, 0, Mode::kFull, threads, 0, 1};
}

#define QUIRE_PREFILL(type, head_dim, rows, keys, mode)                     \
  attention<device::PrefillTraits<type, head_dim, rows, keys, Mode::mode>>( \
      "prefill_" #type "_" #head_dim "_" #rows "_" #keys "_" #mode, Family::kPrefill),
#define QUIRE_PREFILL_SM90(type, head_dim, head_dim_v, rows, keys, stages, mode)              \
  sm90_prefill<                                                                               \
      device::Sm90PrefillTraits<type, head_dim, head_dim_v, rows, keys, stages, Mode::mode>>( \
      "prefill_sm90_" #type "_" #head_dim "_" #head_dim_v "_" #rows "_" #keys "_" #stages     \
      "_" #mode,                                                                              \
      element<type>()),
#define QUIRE_PREFILL_SM90_E4M3(type, head_dim, rows, keys, stages, mode)                 \
  sm90_prefill<device::Sm90E4m3Traits<type, head_dim, rows, keys, stages, Mode::mode>>(   \
      "prefill_sm90_e4m3_" #type "_" #head_dim "_" #rows "_" #keys "_" #stages "_" #mode, \
      ElementType::kFloat8E4M3),
#define QUIRE_DECODE(type, head_dim, warps, stages, mode)                     \
  attention<device::DecodeTraits<type, head_dim, warps, stages, Mode::mode>>( \
      "decode_" #type "_" #head_dim "_" #warps "_" #stages "_" #mode, Family::kDecode),
#define QUIRE_PREFILL_E4M3(type, head_dim, rows, keys, mode)                                    \
  attention<device::PrefillTraits<type, head_dim, rows, keys, Mode::mode, device::Float8E4M3>>( \
      "prefill_e4m3_" #type "_" #head_dim "_" #rows "_" #keys "_" #mode, Family::kPrefill),
#define QUIRE_DECODE_E4M3(type, head_dim, warps, stages, mode)                                    \
  attention<device::DecodeTraits<type, head_dim, warps, stages, Mode::mode, device::Float8E4M3>>( \
      "decode_e4m3_" #type "_" #head_dim "_" #warps "_" #stages "_" #mode, Family::kDecode),
#define QUIRE_MLA_DECODE(type, head_dim, rows, keys, stages, mode)               \
  mla_decode<device::MlaTraits<type, head_dim, rows, keys, stages, Mode::mode>>( \
      "mla_decode_" #type "_" #head_dim "_" #rows "_" #keys "_" #stages "_" #mode),
#define QUIRE_MLA_DECODE_SM90(type, head_dim, rows, keys, stages, mode)                   \
  sm90_mla_decode<device::Sm90MlaTraits<type, head_dim, rows, keys, stages, Mode::mode>>( \
      "mla_decode_sm90_" #type "_" #head_dim "_" #rows "_" #keys "_" #stages "_" #mode),
#define QUIRE_APPEND_KV_E4M3(type, threads)                                        \
  cache_op("append_kv_e4m3_" #type "_" #threads, Family::kAppend, element<type>(), \
           ElementType::kFloat8E4M3, threads),
#define QUIRE_APPEND_KV(type, threads)                                                         \
  cache_op("append_kv_" #type "_" #threads, Family::kAppend, element<type>(), element<type>(), \
           threads),
#define QUIRE_COPY_BLOCKS(threads)                                                               \
  cache_op("copy_blocks_" #threads, Family::kCopy, ElementType::kFloat32, ElementType::kFloat32, \
           threads),
#define QUIRE_MERGE_STATES(type, threads)                                                        \
  cache_op("merge_states_" #type "_" #threads, Family::kMerge, element<type>(), element<type>(), \
           threads),
#define QUIRE_PLAN(threads) planner<device::PlannerTraits<threads>>("plan_" #threads),

inline constexpr Kernel kKernels[] = {
#include "kernels_built.def"
};

#undef QUIRE_PREFILL
#undef QUIRE_PREFILL_SM90
#undef QUIRE_PREFILL_SM90_E4M3
#undef QUIRE_DECODE
#undef QUIRE_PREFILL_E4M3
#undef QUIRE_DECODE_E4M3
#undef QUIRE_MLA_DECODE
#undef QUIRE_MLA_DECODE_SM90
#undef QUIRE_APPEND_KV
#undef QUIRE_APPEND_KV_E4M3
#undef QUIRE_COPY_BLOCKS
#undef QUIRE_MERGE_STATES
#undef QUIRE_PLAN

}  // namespace rows

using rows::kKernels;

// Machine code of some of the kernels for every architecture, as nvcc's fatbinary holds it.
struct Image {
  const char* name;
  const void* data;
};

// Where the images come from: the build (images.cpp), or a test.
struct Images {
  const Image* begin;
  const Image* end;
  const char* archs;  // "80 90a 100 120"
};

}  // namespace quire::cuda
