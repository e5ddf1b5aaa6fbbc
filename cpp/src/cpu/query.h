// SPDX-License-Identifier: Apache-2.0
// The element type of q and out, which need not be that of the cache; queries of e4m3 have outputs
// of bfloat16. Included inside the namespace of the tier.
#pragma once

// f.operator()<T>() for the element type of out, and of q where that is not e4m3.
template <class F>
inline void with_query_type(const AttentionParams& p, F f) {
  switch (p.dtype) {
    case ElementType::kFloat32:
      return f.template operator()<float>();
    case ElementType::kFloat16:
      return f.template operator()<Float16>();
    default:
      return f.template operator()<BFloat16>();
  }
}

// A row of q as floats, times `scale`.
inline void load_query(const Task& task, int row, float scale, float* to) {
  if (task.p.dtype == ElementType::kFloat8E4M3) {
    const auto* from = task.q_row<Float8E4M3>(row);
    for (int d = 0; d < task.p.head_dim; ++d) to[d] = to_float(from[d]) * scale;
    return;
  }
  with_query_type(task.p, [&]<class T>() {
    const T* from = task.q_row<T>(row);
    const Vec factor = set(scale);
    int d = 0;
    for (; d + kWidth <= task.p.head_dim; d += kWidth) store(to + d, mul(load(from + d), factor));
    if (const int n = task.p.head_dim - d) store(to + d, mul(load(from + d, n), factor), n);
  });
}
