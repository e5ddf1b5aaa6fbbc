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

// f(scales, count) for each block of keys [begin, end), in order: the scales of `count` tokens lie
// stride_row apart. Quantised caches are paged.
template <class F>
inline void for_each_block(const Task& task, const KvScale& scale, int64_t begin, int64_t end,
                           F f) {
  const AttentionParams& p = task.p;
  const int32_t* table = p.block_table + task.sequence.kv_row * p.block_table_stride;
  const float* values = scale.values + task.item.kv_head * scale.stride_head;
  int64_t block = begin / p.block_size, offset = begin % p.block_size;
  for (int64_t key = begin; key < end; ++block, offset = 0) {
    const int64_t count = std::min<int64_t>(end - key, p.block_size - offset);
    f(values + table[block] * scale.stride_block + offset * scale.stride_row, count);
    key += count;
  }
}

// Scales lie apart from what they scale: to be called some time before they are used.
inline void prefetch_token_scales(const Task& task, const KvScale& scale, int64_t begin,
                                  int64_t end) {
  constexpr int64_t kLine = 64 / sizeof(float);
  const int64_t step = scale.stride_row == 1 ? kLine : 1;
  for_each_block(task, scale, begin, end, [&](const float* scales, int64_t count) {
    for (int64_t i = 0; i < count; i += step) prefetch(scales + i * scale.stride_row);
  });
}

// out[i] *= the scale of key begin + i, for keys [begin, end).
inline void multiply_token_scales(const Task& task, const KvScale& scale, int64_t begin,
                                  int64_t end, float* out) {
  for_each_block(task, scale, begin, end, [&](const float* scales, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] *= scales[i * scale.stride_row];
    out += count;
  });
}

// Multiplies `rows` rows s[r * stride ...), logits or weights of keys [first, last), by the scales
// of their tokens' k or v. Up to kWidth - 1 elements behind them are written as they were.
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
