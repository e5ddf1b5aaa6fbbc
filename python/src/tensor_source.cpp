// SPDX-License-Identifier: Apache-2.0
#include "tensor_source.h"

#include <nanobind/stl/string.h>

#include <array>
#include <atomic>
#include <mutex>
#include <string>
#include <utility>

namespace quire::python {
namespace {

// A small map from Python types to what was found out about them. Entries are never removed, so
// reading takes no lock; the types are kept alive, so an address means one type. When it is full,
// further types are looked at anew each time.
template <class Value>
class TypeMap {
 public:
  bool find(const void* type, Value& value) const {
    const int count = count_.load(std::memory_order_acquire);
    for (int i = 0; i < count; ++i)
      if (entries_[i].first == type) {
        value = entries_[i].second;
        return true;
      }
    return false;
  }

  void add(nb::handle type, const Value& value) {
    const std::lock_guard lock(mutex_);
    const int count = count_.load(std::memory_order_relaxed);
    Value other;  // what another thread has found out meanwhile
    if (count == kCapacity || find(type.ptr(), other)) return;
    entries_[count] = {type.inc_ref().ptr(), value};
    count_.store(count + 1, std::memory_order_release);
  }

 private:
  static constexpr int kCapacity = 16;
  std::array<std::pair<const void*, Value>, kCapacity> entries_;
  std::atomic<int> count_ = 0;
  std::mutex mutex_;
};

// The attribute of an object, or nothing where it has none.
nb::object attribute(nb::handle object, const char* name) {
  PyObject* value = PyObject_GetAttrString(object.ptr(), name);
  if (!value) PyErr_Clear();
  return nb::steal(value);
}

// numpy.ndarray, if NumPy has been imported and lays out its arrays as foreign_abi.h says.
nb::handle find_ndarray() {
  for (const char* name : {"numpy._core._multiarray_umath", "numpy.core._multiarray_umath"}) {
    const nb::object module = nb::steal(PyImport_GetModule(nb::str(name).ptr()));
    if (!module.is_valid()) continue;
    const nb::object capsule = attribute(module, "_ARRAY_API");
    if (!capsule.is_valid()) continue;
    void** api = static_cast<void**>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
    if (!api) {
      PyErr_Clear();
      continue;
    }
    // PyArray_GetNDArrayCVersion, the check of every extension module: 1.x or 2.x.
    const unsigned version = reinterpret_cast<unsigned (*)()>(api[0])() >> 24;
    if (version == 1 || version == 2) return static_cast<PyObject*>(api[2]);
  }
  return {};
}

const ExchangeApi* find_exchange_api(nb::handle type) {
  const nb::object capsule = attribute(type, "__dlpack_c_exchange_api__");
  if (!capsule.is_valid()) return nullptr;
  void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!table) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api = static_cast<ExchangeApi*>(table);
  while (api && api->major_version != ExchangeApi::kMajorVersion) api = api->prev_api;
  return api && api->dltensor_from_py_object_no_sync ? api : nullptr;
}

TensorSource inspect(nb::handle object) {
  using Kind = TensorSource::Kind;
  const nb::handle type = object.type();
  const nb::handle ndarray = find_ndarray();
  if (ndarray.is_valid() && PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.ptr()),
                                             reinterpret_cast<PyTypeObject*>(ndarray.ptr())))
    return {Kind::kNumpy};
  TensorSource source;
  nb::object requires_grad = attribute(type, "requires_grad");
  if (requires_grad.is_valid())
    source.get_requires_grad = reinterpret_cast<descrgetfunc>(
        PyType_GetSlot(Py_TYPE(requires_grad.ptr()), Py_tp_descr_get));
  source.requires_grad = requires_grad.ptr();  // its type keeps it
  const nb::object module = attribute(type, "__module__");
  std::string module_name;
  source.is_immutable =
      module.is_valid() && nb::try_cast(module, module_name) && module_name.rfind("jax", 0) == 0;
  source.api = find_exchange_api(type);
  if (source.api)
    source.kind = Kind::kExchange;
  else if (attribute(object, "__dlpack__").is_valid())  // JAX has buffers too, but not of bfloat16
    source.kind = Kind::kDlpack;
  else if (PyObject_CheckBuffer(object.ptr()))
    source.kind = Kind::kBuffer;
  return source;
}

}  // namespace

TensorSource source_of(nb::handle object) {
  static TypeMap<TensorSource> known;
  TensorSource source;
  const nb::handle type = object.type();
  if (known.find(type.ptr(), source)) return source;
  source = inspect(object);
  if (source.kind != TensorSource::Kind::kNone) known.add(type, source);
  return source;
}

bool parse_numpy_dtype(const NumpyDescr& descr, DType& dtype) {
  static_assert(sizeof(int) == 4 && sizeof(long long) == 8);
  if (descr.byteorder == '>') return false;
  switch (descr.type_num) {
    case kNumpyFloat32:
      dtype = DType::kFloat32;
      return true;
    case kNumpyFloat16:
      dtype = DType::kFloat16;
      return true;
    case kNumpyInt:
      dtype = DType::kInt32;
      return true;
    case kNumpyLong:
      dtype = sizeof(long) == 8 ? DType::kInt64 : DType::kInt32;
      return true;
    case kNumpyLongLong:
      dtype = DType::kInt64;
      return true;
    case kNumpyInt8:
      dtype = DType::kInt8;
      return true;
    case kNumpyUInt8:
      dtype = DType::kUInt8;
      return true;
    default:
      break;
  }
  if (descr.type_num < kNumpyFirstUserType) return false;
  // Types that packages register: known by their names, looked up by their scalar types.
  static TypeMap<std::pair<bool, DType>> known;
  std::pair<bool, DType> found = {false, {}};
  const nb::handle type = reinterpret_cast<PyObject*>(descr.scalar_type);
  if (!known.find(type.ptr(), found)) {
    const std::string name = nb::cast<std::string>(type.attr("__name__"));
    for (const auto& [known_name, value] :
         {std::pair{"bfloat16", DType::kBFloat16}, std::pair{"float8_e4m3fn", DType::kFloat8E4M3},
          std::pair{"float8_e5m2", DType::kFloat8E5M2}})
      if (name == known_name) found = {true, value};
    known.add(type, found);
  }
  dtype = found.second;
  return found.first;
}

}  // namespace quire::python
