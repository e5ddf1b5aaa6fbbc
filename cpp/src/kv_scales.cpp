// SPDX-License-Identifier: Apache-2.0
#include "quire/kv_scales.h"

#include <cmath>
#include <string>

#include "check.h"
#include "quire/error.h"

namespace quire {
namespace {

bool is_number(const TensorView& scale) {
  return scale.ndim == 1 && scale.shape[0] == 1 && scale.device.type == DeviceType::kCPU;
}

}  // namespace

KvScale kernel_scale(const TensorView& scale) {
  if (!scale) return {nullptr, 0, 0, 0, 1.0f, false};
  if (is_number(scale)) return {nullptr, 0, 0, 0, *scale.as<float>(), false};
  if (scale.ndim == 1) return {scale.as<float>(), 0, 0, scale.strides[0], 1.0f, false};
  return {scale.as<float>(), scale.strides[0], scale.strides[1], scale.strides[2], 1.0f, true};
}

void check_scale(const std::string& argument, const TensorView& scale, const TensorView& cache) {
  if (!scale) return;
  QUIRE_CHECK_ARG(scale.dtype == DType::kFloat32, argument, ": expected float32, got ",
                  describe(scale));
  const bool is_one = is_number(scale);
  QUIRE_CHECK_ARG(is_one || is_quantised(cache.dtype), argument, ": expected none, as ",
                  name_of(cache.dtype), " caches have no scale, got ", describe(scale));
  QUIRE_CHECK_ARG(
      is_one || (scale.device == cache.device &&
                 ((scale.ndim == 1 && scale.shape[0] == cache.shape[2]) ||
                  (scale.ndim == 3 && scale.shape[0] == cache.shape[0] &&
                   scale.shape[1] == cache.shape[1] && scale.shape[2] == cache.shape[2]))),
      argument, ": expected a number, [", cache.shape[2], "] (num_kv_heads) or [", cache.shape[0],
      ", ", cache.shape[1], ", ", cache.shape[2], "] (one a token and head), got ",
      describe(scale));
  if (scale.is_empty()) return;
  QUIRE_CHECK_ARG(scale.data, argument, ": expected data, got a null pointer");
  const uintptr_t misplaced = reinterpret_cast<uintptr_t>(scale.data) % sizeof(float);
  QUIRE_CHECK_ARG(misplaced == 0, argument,
                  ": expected an address aligned to 4 bytes, got one that is off by ", misplaced);
  if (!is_one) return;
  const float number = *scale.as<float>();
  QUIRE_CHECK_ARG(std::isfinite(number) && number > 0, argument,
                  ": expected a finite number > 0, got ", number);
  QUIRE_CHECK_ARG(is_quantised(cache.dtype) || number == 1, argument, ": expected 1, as ",
                  name_of(cache.dtype), " caches have no scale, got ", number);
}

}  // namespace quire
