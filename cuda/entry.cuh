// SPDX-License-Identifier: Apache-2.0
// What a line of kernels.def becomes on the device: an entry point named after the line, around
// the kernel's body.
#pragma once

#include "kernels/cache_ops.h"
#include "kernels/decode.h"
#include "kernels/mla_decode.h"
#include "kernels/plan.h"
#include "kernels/prefill.h"
#include "kernels/sm90/mla_decode.h"
#include "kernels/sm90/prefill.h"
#include "kernels/sm90/prefill_e4m3.h"

// The traits come last: they contain commas.
#define QUIRE_ATTENTION(name, body, Args, ...)                                        \
  extern "C" __global__ void __launch_bounds__(                                       \
      quire::device::__VA_ARGS__::kThreads,                                           \
      quire::device::blocks_per_multiprocessor(quire::device::__VA_ARGS__::kThreads)) \
      name(const __grid_constant__ quire::device::Args args) {                        \
    quire::device::body<quire::device::__VA_ARGS__>(args);                            \
  }

#define QUIRE_PREFILL(type, head_dim, rows, keys, mode)                               \
  QUIRE_ATTENTION(                                                                    \
      prefill_##type##_##head_dim##_##rows##_##keys##_##mode, prefill, AttentionArgs, \
      PrefillTraits<quire::device::type, head_dim, rows, keys, quire::device::Mode::mode>)

#define QUIRE_PREFILL_SM90(type, head_dim, head_dim_v, rows, keys, stages, mode)             \
  QUIRE_ATTENTION(                                                                           \
      prefill_sm90_##type##_##head_dim##_##head_dim_v##_##rows##_##keys##_##stages##_##mode, \
      prefill_sm90, BoxedAttentionArgs,                                                      \
      Sm90PrefillTraits<quire::device::type, head_dim, head_dim_v, rows, keys, stages,       \
                        quire::device::Mode::mode>)

#define QUIRE_PREFILL_SM90_E4M3(type, head_dim, rows, keys, stages, mode)                      \
  QUIRE_ATTENTION(prefill_sm90_e4m3_##type##_##head_dim##_##rows##_##keys##_##stages##_##mode, \
                  prefill_e4m3_sm90, BoxedAttentionArgs,                                       \
                  Sm90E4m3Traits<quire::device::type, head_dim, rows, keys, stages,            \
                                 quire::device::Mode::mode>)

#define QUIRE_DECODE(type, head_dim, warps, stages, mode)                              \
  QUIRE_ATTENTION(                                                                     \
      decode_##type##_##head_dim##_##warps##_##stages##_##mode, decode, AttentionArgs, \
      DecodeTraits<quire::device::type, head_dim, warps, stages, quire::device::Mode::mode>)

#define QUIRE_PREFILL_E4M3(type, head_dim, rows, keys, mode)                            \
  QUIRE_ATTENTION(prefill_e4m3_##type##_##head_dim##_##rows##_##keys##_##mode, prefill, \
                  AttentionArgs,                                                        \
                  PrefillTraits<quire::device::type, head_dim, rows, keys,              \
                                quire::device::Mode::mode, quire::device::Float8E4M3>)

#define QUIRE_DECODE_E4M3(type, head_dim, warps, stages, mode)                           \
  QUIRE_ATTENTION(decode_e4m3_##type##_##head_dim##_##warps##_##stages##_##mode, decode, \
                  AttentionArgs,                                                         \
                  DecodeTraits<quire::device::type, head_dim, warps, stages,             \
                               quire::device::Mode::mode, quire::device::Float8E4M3>)

#define QUIRE_MLA_DECODE(type, head_dim, rows, keys, stages, mode)                      \
  QUIRE_ATTENTION(                                                                      \
      mla_decode_##type##_##head_dim##_##rows##_##keys##_##stages##_##mode, mla_decode, \
      AttentionArgs,                                                                    \
      MlaTraits<quire::device::type, head_dim, rows, keys, stages, quire::device::Mode::mode>)

#define QUIRE_MLA_DECODE_SM90(type, head_dim, rows, keys, stages, mode)                           \
  QUIRE_ATTENTION(                                                                                \
      mla_decode_sm90_##type##_##head_dim##_##rows##_##keys##_##stages##_##mode, mla_decode_sm90, \
      BoxedAttentionArgs,                                                                         \
      Sm90MlaTraits<quire::device::type, head_dim, rows, keys, stages, quire::device::Mode::mode>)

#define QUIRE_APPEND_KV_E4M3(type, threads)                                                       \
  extern "C" __global__ void __launch_bounds__(threads)                                           \
      append_kv_e4m3_##type##_##threads(const __grid_constant__ quire::device::AppendArgs args) { \
    quire::device::append_kv_e4m3<quire::device::type, threads>(args);                            \
  }

#define QUIRE_APPEND_KV(type, threads)                                                       \
  extern "C" __global__ void __launch_bounds__(threads)                                      \
      append_kv_##type##_##threads(const __grid_constant__ quire::device::AppendArgs args) { \
    quire::device::append_kv<quire::device::type, threads>(args);                            \
  }

#define QUIRE_COPY_BLOCKS(threads)                                                        \
  extern "C" __global__ void __launch_bounds__(threads)                                   \
      copy_blocks_##threads(const __grid_constant__ quire::device::CopyBlocksArgs args) { \
    quire::device::copy_blocks<threads>(args);                                            \
  }

#define QUIRE_MERGE_STATES(type, threads)                                                \
  extern "C" __global__ void __launch_bounds__(threads) merge_states_##type##_##threads( \
      const __grid_constant__ quire::device::MergeStatesArgs args) {                     \
    quire::device::merge_states<quire::device::type, threads>(args);                     \
  }

#define QUIRE_PLAN(threads)                                                  \
  extern "C" __global__ void __launch_bounds__(threads)                      \
      plan_##threads(const __grid_constant__ quire::device::PlanArgs args) { \
    quire::device::plan<quire::device::PlannerTraits<threads>>(args);        \
  }
