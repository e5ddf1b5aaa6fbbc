// SPDX-License-Identifier: Apache-2.0
// The functions of the CUDA driver that quire calls, as a table: found in libcuda.so.1 at run time,
// or written by a test. Only what is declared here is known of CUDA's headers, so the host side
// builds where there is no toolkit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace quire::cuda {

// Handles are opaque; an address on a device is an integer.
using Handle = void*;
using DeviceAddress = unsigned long long;

enum Result : int { kSuccess = 0, kNoDevice = 100, kNotReady = 600 };
enum DeviceAttribute : int { kMultiprocessors = 16, kMajor = 75, kMinor = 76 };
inline constexpr int kMaxDynamicSharedBytes = 8;  // a function attribute
inline constexpr int kDevicePointer = 3;          // a pointer attribute
inline constexpr int kRelaxedCapture = 2;
inline constexpr unsigned kDisableTiming = 2;  // a flag of events
inline constexpr unsigned kPortable = 1;       // a flag of pinned memory
inline constexpr int kCaptureActive = 1;
// Of tensor maps: 16-bit elements, rows of 128 bytes swizzled, fetched to L2 by 256 bytes.
inline constexpr int kUInt16 = 1, kNoInterleave = 0, kSwizzle128 = 3, kL2Promotion256 = 3;
inline constexpr int kFillZeros = 0;

// name of the member, symbol in the library, parameters
#define QUIRE_DRIVER_FUNCTIONS(F)                                                                \
  F(init, cuInit, unsigned flags)                                                                \
  F(driver_version, cuDriverGetVersion, int* version)                                            \
  F(error_name, cuGetErrorName, int result, const char** name)                                   \
  F(device_count, cuDeviceGetCount, int* count)                                                  \
  F(device_name, cuDeviceGetName, char* name, int length, int device)                            \
  F(device_attribute, cuDeviceGetAttribute, int* value, int attribute, int device)               \
  F(retain_context, cuDevicePrimaryCtxRetain, Handle* context, int device)                       \
  F(current_context, cuCtxGetCurrent, Handle* context)                                           \
  F(push_context, cuCtxPushCurrent_v2, Handle context)                                           \
  F(pop_context, cuCtxPopCurrent_v2, Handle* context)                                            \
  F(load_library, cuLibraryLoadData, Handle* library, const void* image, Handle jit_options,     \
    Handle jit_values, unsigned num_jit, Handle options, Handle values, unsigned num)            \
  F(library_kernel, cuLibraryGetKernel, Handle* kernel, Handle library, const char* name)        \
  F(kernel_function, cuKernelGetFunction, Handle* function, Handle kernel)                       \
  F(set_attribute, cuFuncSetAttribute, Handle function, int attribute, int value)                \
  F(launch, cuLaunchKernel, Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,  \
    unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, Handle stream,  \
    void** arguments, void** extra)                                                              \
  F(allocate, cuMemAlloc_v2, DeviceAddress* address, size_t bytes)                               \
  F(allocate_pinned, cuMemHostAlloc, void** memory, size_t bytes, unsigned flags)                \
  F(copy_to_device, cuMemcpyHtoDAsync_v2, DeviceAddress to, const void* from, size_t bytes,      \
    Handle stream)                                                                               \
  F(pointer_attribute, cuPointerGetAttribute, void* value, int attribute, DeviceAddress pointer) \
  F(create_event, cuEventCreate, Handle* event, unsigned flags)                                  \
  F(record_event, cuEventRecord, Handle event, Handle stream)                                    \
  F(query_event, cuEventQuery, Handle event)                                                     \
  F(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, int* mode)                         \
  F(capture_info, cuStreamGetCaptureInfo, Handle stream, int* status, uint64_t* id)              \
  F(encode_tensor_map, cuTensorMapEncodeTiled, void* map, int type, unsigned rank, void* base,   \
    const uint64_t* dims, const uint64_t* strides, const uint32_t* box,                          \
    const uint32_t* element_strides, int interleave, int swizzle, int promotion, int fill)

struct Driver {
#define QUIRE_MEMBER(member, symbol, ...) int (*member)(__VA_ARGS__) = nullptr;
  QUIRE_DRIVER_FUNCTIONS(QUIRE_MEMBER)
#undef QUIRE_MEMBER
};

// The oldest driver that takes machine code of the toolkit the kernels are compiled with.
inline constexpr int kOldestDriver = 13000;

// Fills the table from the machine's driver; false with a sentence if there is none.
bool load_driver(Driver& driver, std::string& problem);

// Initialises CUDA. Returns the number of devices, or 0 with a sentence that says why none can be
// used.
int start(const Driver& driver, std::string& problem);

[[noreturn]] void fail(const Driver& driver, int result, const char* call, const char* detail);

// Throws CudaError unless `result` is success: "cuLaunchKernel(decode_...): CUDA_ERROR_...".
inline void check(const Driver& driver, int result, const char* call, const char* detail = "") {
  if (result != kSuccess) fail(driver, result, call, detail);
}

}  // namespace quire::cuda
