// SPDX-License-Identifier: Apache-2.0
// Errors. Running out of blocks is none of them: it is a normal result (std::optional or bool).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace quire {

// A caller's argument is wrong. The message reads "function: argument: expected ..., got ...".
// Thrown before any work is done; Python sees ValueError.
struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// No kernel for this combination on this device; the message says why each candidate lost.
// Python sees NotImplementedError.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A call to the CUDA driver failed; the message names the call and the driver's error. Python sees
// RuntimeError.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A broken invariant of quire's own, found by a validate(). Python sees RuntimeError.
struct InvariantError : std::logic_error {
  using std::logic_error::logic_error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace quire

// The message is built only when the check fails.
#define QUIRE_CHECK_ARG(condition, ...)                                             \
  do {                                                                              \
    if (!(condition)) throw ::quire::InvalidArgument(::quire::concat(__VA_ARGS__)); \
  } while (0)

#define QUIRE_INVARIANT(condition, ...)                                            \
  do {                                                                             \
    if (!(condition)) throw ::quire::InvariantError(::quire::concat(__VA_ARGS__)); \
  } while (0)
