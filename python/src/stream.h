// SPDX-License-Identifier: Apache-2.0
// Which CUDA stream a call's work goes to.
#pragma once

#include <nanobind/nanobind.h>

#include "quire/device.h"

namespace nb = nanobind;

namespace quire::python {

// `stream`: None, an integer handle, or an object with __cuda_stream__. None is the stream that the
// framework of `tensor` works on, where its DLPack exchange API tells, else the default stream. On
// the CPU only None is right. `function` begins the error messages.
void* stream_of(nb::handle stream, nb::handle tensor, Device device, const char* function);

}  // namespace quire::python
