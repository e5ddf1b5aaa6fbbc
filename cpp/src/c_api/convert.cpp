// SPDX-License-Identifier: Apache-2.0
// Errors, tensors and the machine, as C sees them.
#include "c_api/convert.h"

#include <exception>
#include <new>
#include <system_error>

#include "quire/backend.h"

namespace quire::c {
namespace {

thread_local std::string last_error;

QuireStatus fail(QuireStatus status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();  // no memory for the words: the status must do
  }
  return status;
}

static_assert(QUIRE_FLOAT32 == static_cast<int>(DType::kFloat32) &&
              QUIRE_FLOAT16 == static_cast<int>(DType::kFloat16) &&
              QUIRE_BFLOAT16 == static_cast<int>(DType::kBFloat16) &&
              QUIRE_INT32 == static_cast<int>(DType::kInt32) &&
              QUIRE_INT64 == static_cast<int>(DType::kInt64) &&
              QUIRE_UINT8 == static_cast<int>(DType::kUInt8));
static_assert(QUIRE_CPU == static_cast<int>(DeviceType::kCPU) &&
              QUIRE_CUDA == static_cast<int>(DeviceType::kCUDA));
static_assert(QUIRE_MAX_DIMS == TensorView::kMaxDims);

}  // namespace

QuireStatus current_exception_status() noexcept {
  try {
    throw;
  } catch (const InvalidArgument& error) {
    return fail(QUIRE_INVALID_ARGUMENT, error.what());
  } catch (const Unsupported& error) {
    return fail(QUIRE_UNSUPPORTED, error.what());
  } catch (const std::bad_alloc&) {
    return fail(QUIRE_OUT_OF_MEMORY, "out of memory");
  } catch (const std::system_error& error) {
    return fail(QUIRE_SYSTEM_ERROR, error.what());
  } catch (const std::exception& error) {
    return fail(QUIRE_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(QUIRE_INTERNAL_ERROR, "unknown error");
  }
}

DType as_dtype(const char* argument, int32_t dtype) {
  QUIRE_CHECK_ARG(dtype >= QUIRE_FLOAT32 && dtype <= QUIRE_INT8, argument,
                  ": expected a QuireDType, got ", dtype);
  return static_cast<DType>(dtype);
}

Device as_device(const char* argument, int32_t type, int32_t index) {
  QUIRE_CHECK_ARG(type == QUIRE_CPU || type == QUIRE_CUDA, argument,
                  ": expected a QuireDeviceType, got ", type);
  return {static_cast<DeviceType>(type), index};
}

TensorView as_view(const char* argument, const QuireTensor* tensor) {
  const QuireTensor& given = deref(argument, tensor);
  QUIRE_CHECK_ARG(given.ndim >= 1 && given.ndim <= QUIRE_MAX_DIMS, argument, ": expected 1 to ",
                  int{QUIRE_MAX_DIMS}, " dimensions, got ", given.ndim);
  TensorView view;
  view.data = given.data;
  view.dtype = as_dtype(argument, given.dtype);
  view.device = as_device(argument, given.device_type, given.device_index);
  view.ndim = given.ndim;
  for (int i = 0; i < given.ndim; ++i) {
    QUIRE_CHECK_ARG(given.shape[i] >= 0, argument, ": expected extents of at least 0, got ",
                    given.shape[i], " in dimension ", i);
    view.shape[i] = given.shape[i];
    view.strides[i] = given.strides[i];
  }
  QUIRE_CHECK_ARG(view.data || view.is_empty(), argument, ": expected ", describe(view),
                  ", got NULL data");
  return view;
}

TensorView as_optional_view(const char* argument, const QuireTensor* tensor) {
  return tensor ? as_view(argument, tensor) : TensorView{};
}

}  // namespace quire::c

using namespace quire::c;

const char* quire_last_error(void) { return last_error.c_str(); }

const char* quire_version(void) { return QUIRE_VERSION; }

QuireStatus quire_cpu_isa(char* buffer, size_t* size) {
  return guard([&] { write_string("quire_cpu_isa: size", quire::cpu_isa(), buffer, size); });
}

QuireStatus quire_num_threads(int32_t* count) {
  return guard([&] { deref("quire_num_threads: count", count) = quire::num_threads(); });
}

QuireStatus quire_set_num_threads(int32_t count) {
  return guard([&] { quire::set_num_threads(count); });
}

QuireTensor quire_tensor(void* data, QuireDType dtype, int32_t ndim, const int64_t* shape) {
  QuireTensor tensor{};
  tensor.data = data;
  tensor.dtype = dtype;
  tensor.ndim = shape ? ndim : 0;
  int64_t stride = 1;
  for (int i = std::min<int32_t>(tensor.ndim, QUIRE_MAX_DIMS) - 1; i >= 0; --i) {
    tensor.shape[i] = shape[i];
    tensor.strides[i] = stride;
    stride *= shape[i];
  }
  return tensor;
}
