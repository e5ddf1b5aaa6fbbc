// SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

#include <nanobind/ndarray.h>

#include <cstring>
#include <string>

#include "quire/error.h"

namespace quire::python {
namespace {

// A struct-module format of one native element -> a type; false where quire has none for it.
bool parse_format(const char* format, Py_ssize_t itemsize, DType& dtype) {
  if (!format) format = "B";
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (std::strlen(format) != 1) return false;
  switch (*format) {
    case 'f':
      dtype = DType::kFloat32;
      return true;
    case 'e':
      dtype = DType::kFloat16;
      return true;
    case 'i':
    case 'l':
    case 'q':
      dtype = itemsize == 4 ? DType::kInt32 : DType::kInt64;
      return itemsize == 4 || itemsize == 8;
    case 'B':
      dtype = DType::kUInt8;
      return true;
    default:
      return false;
  }
}

bool parse_dlpack(nb::dlpack::dtype type, DType& dtype) {
  using Code = nb::dlpack::dtype_code;
  struct Row {
    Code code;
    int bits;
    DType dtype;
  };
  static constexpr Row kRows[] = {
      {Code::Float, 32, DType::kFloat32},   {Code::Float, 16, DType::kFloat16},
      {Code::Bfloat, 16, DType::kBFloat16}, {Code::Int, 32, DType::kInt32},
      {Code::Int, 64, DType::kInt64},       {Code::UInt, 8, DType::kUInt8},
  };
  for (const Row& row : kRows)
    if (type.code == static_cast<uint8_t>(row.code) && type.bits == row.bits && type.lanes == 1) {
      dtype = row.dtype;
      return true;
    }
  return false;
}

std::string python_type(nb::handle object) { return nb::cast<std::string>(nb::inst_name(object)); }

[[noreturn]] void refuse_type(const char* name, nb::handle object) {
  const std::string message = concat(
      name, ": expected a NumPy array or an object with __dlpack__, got ", python_type(object));
  throw nb::type_error(message.c_str());
}

std::string dtype_of(nb::handle object) {
  return nb::cast<std::string>(nb::str(nb::getattr(object, "dtype", nb::str("unknown"))));
}

}  // namespace

TensorArgs::~TensorArgs() {
  for (Py_buffer& buffer : buffers_) PyBuffer_Release(&buffer);
}

TensorView TensorArgs::from_numpy(nb::handle object, const char* name) {
  Py_buffer buffer;
  bool is_bfloat16 = false;
  if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    // NumPy exports no buffer of ml_dtypes' types: take the same memory as uint16. Asking for the
    // dtype takes longer than all the rest, so only here.
    is_bfloat16 = dtype_of(object) == "bfloat16";
    const nb::object array = is_bfloat16 ? object.attr("view")("uint16") : nb::borrow(object);
    if (PyObject_GetBuffer(array.ptr(), &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      throw InvalidArgument(
          concat(name, ": expected float32, float16, bfloat16, int32, int64 or uint8, got ",
                 dtype_of(object)));
    }
  }
  buffers_.push_back(buffer);
  TensorView view;
  if (is_bfloat16)
    view.dtype = DType::kBFloat16;
  else
    QUIRE_CHECK_ARG(parse_format(buffer.format, buffer.itemsize, view.dtype), name,
                    ": expected float32, float16, bfloat16, int32, int64 or uint8, got ",
                    dtype_of(object));
  QUIRE_CHECK_ARG(buffer.ndim <= TensorView::kMaxDims, name, ": expected at most ",
                  TensorView::kMaxDims, " dimensions, got ", buffer.ndim);
  view.data = buffer.buf;
  view.read_only = buffer.readonly;
  view.ndim = buffer.ndim;
  for (int i = 0; i < buffer.ndim; ++i) {
    view.shape[i] = buffer.shape[i];
    QUIRE_CHECK_ARG(buffer.strides[i] % buffer.itemsize == 0, name,
                    ": expected strides in whole elements, got ", buffer.strides[i], " bytes");
    view.strides[i] = buffer.strides[i] / buffer.itemsize;
  }
  return view;
}

TensorView TensorArgs::from_dlpack(nb::handle object, const char* name) {
  // No gradient would flow through: better said than found out.
  QUIRE_CHECK_ARG(!nb::cast<bool>(nb::getattr(object, "requires_grad", nb::bool_(false))), name,
                  ": expected a tensor without gradient, got one that requires grad; detach() it");
  nb::ndarray<nb::ro> array;
  QUIRE_CHECK_ARG(nb::try_cast(object, array), name, ": ", python_type(object),
                  " could not be exported through DLPack");
  TensorView view;
  view.read_only = false;
  QUIRE_CHECK_ARG(parse_dlpack(array.dtype(), view.dtype), name,
                  ": expected float32, float16, bfloat16, int32, int64 or uint8, got ",
                  dtype_of(object));
  QUIRE_CHECK_ARG(array.ndim() <= TensorView::kMaxDims, name, ": expected at most ",
                  TensorView::kMaxDims, " dimensions, got ", array.ndim());
  constexpr int kPinned = 3, kManaged = 13;  // DLPack's numbers
  const int type = array.device_type();
  const bool is_cuda = type == nb::device::cuda::value || type == kManaged;
  QUIRE_CHECK_ARG(is_cuda || type == nb::device::cpu::value || type == kPinned, name,
                  ": expected a tensor on the CPU or on CUDA, got DLPack device type ", type);
  if (is_cuda) view.device = {DeviceType::kCUDA, array.device_id()};
  view.data = const_cast<void*>(static_cast<const void*>(array.data()));
  view.ndim = static_cast<int>(array.ndim());
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[i] = static_cast<int64_t>(array.shape(i));
    view.strides[i] = array.stride(i);
  }
  objects_.push_back(nb::borrow(object));
  objects_.push_back(nb::cast(array));
  return view;
}

TensorView TensorArgs::input(nb::handle object, const char* name) {
  if (PyObject_CheckBuffer(object.ptr())) return from_numpy(object, name);
  if (nb::hasattr(object, "__dlpack__")) return from_dlpack(object, name);
  refuse_type(name, object);
}

TensorView TensorArgs::output(nb::handle object, const char* name) {
  TensorView view = input(object, name);
  QUIRE_CHECK_ARG(!view.read_only, name, ": expected writable memory, got a read-only array");
  return view;
}

TensorView TensorArgs::optional_input(nb::handle object, const char* name) {
  return object.is_none() ? TensorView{} : input(object, name);
}

Int32Arg::Int32Arg(nb::handle object, const char* name) {
  if (nb::isinstance<nb::list>(object) || nb::isinstance<nb::tuple>(object)) {
    if (!nb::try_cast(object, copy_)) {
      const std::string message = concat(name, ": expected an int32 array or a list of ints");
      throw nb::type_error(message.c_str());
    }
    data_ = copy_.data();
    size_ = copy_.size();
    return;
  }
  const TensorView view = args_.input(object, name);
  QUIRE_CHECK_ARG(
      view.dtype == DType::kInt32 && view.ndim == 1 && view.device.type == DeviceType::kCPU, name,
      ": expected a one-dimensional int32 array on the CPU, got ", describe(view));
  QUIRE_CHECK_ARG(view.shape[0] <= 1 || view.strides[0] == 1, name,
                  ": expected a contiguous array, got stride ", view.strides[0]);
  data_ = view.as<int32_t>();
  size_ = static_cast<size_t>(view.shape[0]);
}

}  // namespace quire::python
