// SPDX-License-Identifier: Apache-2.0
// The scales of quantised keys and values. Included inside the namespace of the tier.
#pragma once

template <class T>
constexpr bool kIsQuantised = sizeof(T) == 1;

// What load() of any k or v of the item is to be multiplied by, apart from its token's own scale.
template <class T>
float item_scale(const Task& task, const KvScale& scale) {
  if (!kIsQuantised<T>) return 1.0f;
  if (scale.is_per_token) return kLoadUnit<T>;
  return kLoadUnit<T> *
         (scale.values ? scale.values[task.item.kv_head * scale.stride_head] : scale.value);
}

// out[i] *= the scale of key begin + i, for keys [begin, end) of the same chunk.
inline void multiply_token_scales(const Task& task, const KvScale& scale, int64_t begin,
                                  int64_t end, float* out) {
  const float* where[kKvChunk];
  task.scale_rows(scale, begin, end, where);
  for (int64_t i = 0; i < end - begin; ++i) out[i] *= *where[i];
}
