// SPDX-License-Identifier: Apache-2.0
// Lines of kernels_built.def as rows of a table. Whoever includes this defines the macros of its
// own kernels after it; the others are nothing.
#pragma once

#include <iterator>

#include "emulated/bodies.h"
#include "kernels/launch.h"

namespace quire::cuda {

struct NamedBody {
  const char* name;
  KernelBody run;
};

template <class Args, void (*kBody)(const Args&)>
void run_body(const void* args) {
  kBody(*static_cast<const Args*>(args));
}

template <size_t kCount>
KernelBody find_body(const NamedBody (&bodies)[kCount], const std::string& name) {
  for (const NamedBody& body : bodies)
    if (name == body.name) return body.run;
  return nullptr;
}

}  // namespace quire::cuda

#define QUIRE_PREFILL(...)
#define QUIRE_PREFILL_SM90(...)
#define QUIRE_PREFILL_SM90_E4M3(...)
#define QUIRE_DECODE(...)
#define QUIRE_PREFILL_E4M3(...)
#define QUIRE_DECODE_E4M3(...)
#define QUIRE_MLA_DECODE(...)
#define QUIRE_MLA_DECODE_SM90(...)
#define QUIRE_APPEND_KV(...)
#define QUIRE_APPEND_KV_E4M3(...)
#define QUIRE_COPY_BLOCKS(...)
#define QUIRE_MERGE_STATES(...)
#define QUIRE_PLAN(...)
