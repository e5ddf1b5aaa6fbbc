// SPDX-License-Identifier: Apache-2.0
// What is known of an architecture by its name ("sm_90"), so that the decisions for any GPU can be
// made, and tested, on any machine.
#pragma once

#include <string>

namespace quire::cuda {

// The architecture of `archs` ("80 90a 100 120") whose code a device of `isa` ("sm_90") runs, or
// "". Code for sm_XY runs on later minor versions of X; code for sm_XYa on XY alone.
std::string serving_arch(const std::string& archs, const std::string& isa);

// Bytes of shared memory that a block may have, and that a multiprocessor has.
int shared_bytes_per_block(const std::string& isa);
int shared_bytes_per_multiprocessor(const std::string& isa);

// The names in `archs`, for people: "sm_80, sm_90a".
std::string list_of(const std::string& archs);

}  // namespace quire::cuda
