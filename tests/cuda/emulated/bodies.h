// SPDX-License-Identifier: Apache-2.0
// The kernels' bodies, by the names of their entry points: what a launch runs.
#pragma once

#include <string>

namespace quire::cuda {

using KernelBody = void (*)(const void* args);

// Null where the list holds no such kernel.
KernelBody prefill_body(const std::string& name);
KernelBody prefill_sm90_body(const std::string& name);
KernelBody decode_body(const std::string& name);
KernelBody mla_decode_body(const std::string& name);
KernelBody cache_op_body(const std::string& name);

}  // namespace quire::cuda
