// SPDX-License-Identifier: Apache-2.0
// How the tensors and options of a one-shot call become a description, a batch and parameters.
#pragma once

#include <string>

#include "quire/attention.h"

namespace quire {

AttentionDesc describe_call(const AttentionTensors& tensors, const AttentionOptions& options,
                            bool paged);

// Of a dense or ragged call; checks the number of dimensions and cu_seqlens. `function` is what
// error messages begin with.
AttentionBatch describe_batch(const std::string& function, const AttentionTensors& tensors,
                              const TensorView& cu_seqlens_q, const TensorView& cu_seqlens_k);

// Of validated tensors.
AttentionParams make_params(const AttentionDesc& desc, const AttentionPlan& plan,
                            const AttentionTensors& tensors);

}  // namespace quire
