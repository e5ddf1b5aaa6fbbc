// SPDX-License-Identifier: Apache-2.0
// The CUDA backend over any driver: that of the machine, or one that a test has written.
#pragma once

#include <memory>
#include <string>

#include "host/driver.h"
#include "host/registry.h"
#include "quire/backend.h"

namespace quire::cuda {

struct Made {
  std::unique_ptr<Backend> backend;  // null: no device can be used
  std::string state;                 // one sentence
};

// `driver` and `images` must outlive the backend.
Made make_backend(const Driver& driver, const Images& images);

}  // namespace quire::cuda
