// SPDX-License-Identifier: Apache-2.0
#include "tensor.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "quire/error.h"

namespace quire::python {
namespace {

constexpr const char* kTypes =
    ": expected float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int32, int64, int8 or "
    "uint8, got ";

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
    case 'b':
      dtype = DType::kInt8;
      return true;
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
      {Code::Float, 32, DType::kFloat32},
      {Code::Float, 16, DType::kFloat16},
      {Code::Bfloat, 16, DType::kBFloat16},
      {Code::Int, 32, DType::kInt32},
      {Code::Int, 64, DType::kInt64},
      {Code::UInt, 8, DType::kUInt8},
      {Code::Int, 8, DType::kInt8},
      {Code::Float8_E4M3FN, 8, DType::kFloat8E4M3},
      {Code::Float8_E5M2, 8, DType::kFloat8E5M2},
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

// Takes the pending Python error and tells what it says.
[[noreturn]] void refuse_export(const char* name, nb::handle object) {
  std::string reason = "no tensor came back";
  if (PyErr_Occurred()) {
    const nb::python_error error;
    reason = nb::cast<std::string>(nb::str(error.value()));
    reason.resize(std::min(reason.find('\n'), reason.size()));  // torch adds a stack trace
  }
  throw InvalidArgument(
      concat(name, ": ", python_type(object), " could not be exported through DLPack: ", reason));
}

Device parse_device(const nb::dlpack::device& device, const char* name) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
      return {};
    case kDLCUDA:
    case kDLCUDAManaged:
      return {DeviceType::kCUDA, device.device_id};
    default:
      throw InvalidArgument(concat(name, ": expected a tensor on the CPU or a CUDA device, got one",
                                   " on DLPack's device type ", device.device_type));
  }
}

void check_ndim(const char* name, int64_t ndim) {
  QUIRE_CHECK_ARG(ndim <= TensorView::kMaxDims, name, ": expected at most ", TensorView::kMaxDims,
                  " dimensions, got ", ndim);
}

// Shape, and strides that are given in bytes.
void set_extents(TensorView& view, int ndim, const Py_ssize_t* shape, const Py_ssize_t* strides,
                 const char* name) {
  check_ndim(name, ndim);
  view.ndim = ndim;
  const auto size = static_cast<Py_ssize_t>(size_of(view.dtype));
  const int shift = size == 8 ? 3 : size / 2;  // a division each would take longer than the rest
  for (int i = 0; i < ndim; ++i) {
    view.shape[i] = shape[i];
    QUIRE_CHECK_ARG((strides[i] & (size - 1)) == 0, name,
                    ": expected strides in whole elements, got ", strides[i], " bytes");
    view.strides[i] = strides[i] >> shift;
  }
}

// `object` is whose tensor it is.
TensorView view_of(const nb::dlpack::dltensor& tensor, nb::handle object, const char* name) {
  TensorView view;
  QUIRE_CHECK_ARG(parse_dlpack(tensor.dtype, view.dtype), name, kTypes, dtype_of(object));
  check_ndim(name, tensor.ndim);
  view.device = parse_device(tensor.device, name);
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.ndim = tensor.ndim;
  int64_t contiguous = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.shape[i] = tensor.shape[i];
    view.strides[i] = tensor.strides ? tensor.strides[i] : contiguous;  // null before DLPack 1.2
    contiguous *= view.shape[i];
  }
  // torch's fake tensors, for one, which stand for tensors while a graph is traced.
  QUIRE_CHECK_ARG(tensor.data || contiguous == 0, name,
                  ": expected a tensor with memory, got one at the null address");
  return view;
}

// No gradient would flow through: better said than found out.
void check_no_gradient(const TensorSource& source, nb::handle object, const char* name) {
  const nb::object value =
      nb::steal(source.get_requires_grad(source.requires_grad, object.ptr(), object.type().ptr()));
  if (!value.is_valid()) throw nb::python_error();
  QUIRE_CHECK_ARG(value.ptr() != Py_True, name,
                  ": expected a tensor without gradient, got one that requires grad; detach() it");
}

}  // namespace

TensorArgs::~TensorArgs() {
  for (Py_buffer& buffer : buffers_) PyBuffer_Release(&buffer);
  for (int i = 0; i < num_held_; ++i) Py_DECREF(held_[i]);
}

void TensorArgs::hold(nb::handle object) {
  QUIRE_CHECK_ARG(num_held_ < kMaxHeld, "expected at most ", kMaxHeld, " tensors in one call");
  held_[num_held_++] = object.inc_ref().ptr();
}

TensorView TensorArgs::from_numpy(nb::handle object, const char* name) {
  const auto& array = *reinterpret_cast<const NumpyArray*>(object.ptr());
  TensorView view;
  QUIRE_CHECK_ARG(parse_numpy_dtype(*array.descr, view.dtype), name, kTypes, dtype_of(object));
  view.data = array.data;
  view.read_only = (array.flags & kNumpyWriteable) == 0;
  set_extents(view, array.ndim, array.shape, array.strides, name);
  return view;
}

TensorView TensorArgs::from_exchange(const ExchangeApi& api, nb::handle object, const char* name) {
  nb::dlpack::dltensor tensor;
  if (api.dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) refuse_export(name, object);
  return view_of(tensor, object, name);
}

TensorView TensorArgs::from_buffer(nb::handle object, const char* name) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    throw InvalidArgument(concat(name, kTypes, dtype_of(object)));
  }
  buffers_.push_back(buffer);
  TensorView view;
  QUIRE_CHECK_ARG(parse_format(buffer.format, buffer.itemsize, view.dtype), name, kTypes,
                  dtype_of(object));
  view.data = buffer.buf;
  view.read_only = buffer.readonly;
  set_extents(view, buffer.ndim, buffer.shape, buffer.strides, name);
  return view;
}

TensorView TensorArgs::from_dlpack(const TensorSource& source, nb::handle object,
                                   const char* name) {
  nb::ndarray<nb::ro> array;
  if (!nb::try_cast(object, array)) {
    // nanobind does not say why; the method itself does.
    const nb::object capsule = nb::steal(PyObject_CallMethod(object.ptr(), "__dlpack__", nullptr));
    refuse_export(name, object);
  }
  nb::dlpack::dltensor tensor;
  tensor.data = const_cast<void*>(static_cast<const void*>(array.data()));
  tensor.device = {array.device_type(), array.device_id()};
  tensor.ndim = static_cast<int32_t>(array.ndim());
  tensor.dtype = array.dtype();
  tensor.shape = const_cast<int64_t*>(array.shape_ptr());
  tensor.strides = const_cast<int64_t*>(array.stride_ptr());
  TensorView view = view_of(tensor, object, name);
  view.read_only = source.is_immutable;
  hold(nb::cast(array));
  return view;
}

TensorView TensorArgs::input(nb::handle object, const char* name) {
  const TensorSource source = source_of(object);
  if (source.get_requires_grad) check_no_gradient(source, object, name);
  hold(object);
  switch (source.kind) {
    case TensorSource::Kind::kNumpy:
      return from_numpy(object, name);
    case TensorSource::Kind::kExchange:
      return from_exchange(*source.api, object, name);
    case TensorSource::Kind::kBuffer:
      return from_buffer(object, name);
    case TensorSource::Kind::kDlpack:
      return from_dlpack(source, object, name);
    case TensorSource::Kind::kNone:
      break;
  }
  refuse_type(name, object);
}

TensorView TensorArgs::output(nb::handle object, const char* name) {
  TensorView view = input(object, name);
  QUIRE_CHECK_ARG(!view.read_only, name, ": expected writable memory, got a read-only array");
  return view;
}

TensorView TensorArgs::optional_input(nb::handle object, const char* name) {
  if (object.is_none()) return {};
  TensorView view = input(object, name);
  QUIRE_CHECK_ARG(view.ndim > 0, name, ": expected an array, got one of no dimensions");
  return view;
}

TensorView TensorArgs::optional_output(nb::handle object, const char* name) {
  if (object.is_none()) return {};
  TensorView view = output(object, name);
  QUIRE_CHECK_ARG(view.ndim > 0, name, ": expected an array, got one of no dimensions");
  return view;
}
TensorView TensorArgs::scale(nb::handle object, const char* name, float& number) {
  const bool is_int = PyLong_CheckExact(object.ptr());
  if (!is_int && !PyFloat_Check(object.ptr())) {
    TensorView view = input(object, name);
    if (view.ndim == 0) view.ndim = 1, view.shape[0] = view.strides[0] = 1;
    return view;
  }
  number =
      static_cast<float>(is_int ? PyLong_AsDouble(object.ptr()) : PyFloat_AsDouble(object.ptr()));
  PyErr_Clear();  // an int beyond all floats is -1 then: refused for its sign
  return {&number, DType::kFloat32, {1}};
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
