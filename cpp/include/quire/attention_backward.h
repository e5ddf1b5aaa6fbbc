// SPDX-License-Identifier: Apache-2.0
// The gradients of attention, dense and ragged.
#pragma once

#include "quire/attention.h"

namespace quire {

// What comes in and goes out beside the tensors of the forward call.
struct AttentionGradients {
  TensorView dout;        // of the shape and dtype of out
  TensorView dq, dk, dv;  // written: of the shapes and dtype of q, k, v
  TensorView dsinks;      // written where sinks are given: float32 [num_heads]
};

// `tensors`, `options` and cu_seqlens are those of the call of attention(), `out` and `lse` as it
// wrote them. Rows that see no key, and keys that no row sees, get gradients of 0, whatever q,
// dout, k or v hold there. The gradient of a sequence depends on that sequence only, to the bit;
// dsinks is summed over the batch in order.
void attention_backward(const AttentionTensors& tensors, const AttentionGradients& gradients,
                        const AttentionOptions& options, const TensorView& cu_seqlens_q = {},
                        const TensorView& cu_seqlens_k = {});

}  // namespace quire
