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

// Multiplies `rows` rows s[r * stride ...), logits or weights of keys [first, last), by the scales of
// their tokens' k or v. Up to kWidth - 1 elements behind them are written as they were.
template <class T>
void scale_tokens(const Task& task, const KvScale& scale, int64_t first, int64_t last, float* s,
                  int rows, int stride) {
  if (!kIsQuantised<T> || !scale.is_per_token) return;
  float scales[kKvChunk + 16];
  const int count = static_cast<int>(last - first);
  std::fill_n(scales, count + 16, 1.0f);
  multiply_token_scales(task, scale, first, last, scales);
  for (int r = 0; r < rows; ++r, s += stride)
    for (int j = 0; j < count; j += kWidth) store(s + j, mul(load(s + j), load(scales + j)));
}
