// SPDX-License-Identifier: Apache-2.0
// Attention.plan(): of arrays on the host, or on the GPU that the model runs on.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>

#include "quire/attention.h"

namespace nb = nanobind;

namespace quire::python {

extern const char* const kPlanDoc;

AttentionPlan make_plan(const Attention& attention, nb::handle block_table, nb::handle seq_lens,
                        nb::handle cu_seqlens_q, std::optional<int> max_total_q, nb::handle stream);

void bind_attention_plan(nb::module_& m);

}  // namespace quire::python
