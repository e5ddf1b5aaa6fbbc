// SPDX-License-Identifier: Apache-2.0
// The images that the build has made; generated/images.cpp defines it.
#pragma once

#include "host/registry.h"

namespace quire::cuda {

const Images& images();

}  // namespace quire::cuda
