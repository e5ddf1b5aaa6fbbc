// SPDX-License-Identifier: Apache-2.0
#include "stream.h"

#include <cstdint>

#include "quire/error.h"

namespace quire::python {
namespace {

// DLPackExchangeAPI of DLPack 1.2 and later, as far as it is used here.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* tensor_functions[4];
  int (*current_work_stream)(int device_type, int32_t device_id, void** stream);
};

constexpr int kDLPackCuda = 2;

// Of a torch whose tensors have no exchange API yet.
void* torch_stream(nb::handle tensor, int device_index) {
  const nb::object torch = nb::module_::import_("sys").attr("modules").attr("get")("torch");
  if (torch.is_none() || !nb::isinstance(tensor, torch.attr("Tensor"))) return nullptr;
  const nb::object stream = torch.attr("cuda").attr("current_stream")(device_index);
  return reinterpret_cast<void*>(nb::cast<uintptr_t>(stream.attr("cuda_stream")));
}

void* framework_stream(nb::handle tensor, int device_index) {
  const nb::object capsule =
      nb::getattr(nb::handle(tensor.type()), "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
    return torch_stream(tensor, device_index);
  const auto* api =
      static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api && api->major != 1) api = api->previous;
  void* stream = nullptr;
  if (!api || !api->current_work_stream) return torch_stream(tensor, device_index);
  if (api->current_work_stream(kDLPackCuda, device_index, &stream) != 0) throw nb::python_error();
  return stream;
}

}  // namespace

void* stream_of(nb::handle stream, nb::handle tensor, Device device, const char* function) {
  if (device.type == DeviceType::kCPU) {
    QUIRE_CHECK_ARG(stream.is_none(), function, ": stream: expected None for tensors on the CPU");
    return nullptr;
  }
  if (stream.is_none()) return framework_stream(tensor, device.index);
  nb::object handle = nb::borrow(stream);
  if (nb::hasattr(stream, "__cuda_stream__"))  // (version, handle)
    handle = nb::object(stream.attr("__cuda_stream__")())[1];
  uintptr_t value = 0;
  if (!nb::try_cast(handle, value)) {
    const std::string message =
        concat(function, ": stream: expected None, an int or an object with __cuda_stream__, got ",
               nb::type_name(stream.type()).c_str());
    throw nb::type_error(message.c_str());
  }
  return reinterpret_cast<void*>(value);
}

}  // namespace quire::python
