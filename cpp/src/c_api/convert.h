// SPDX-License-Identifier: Apache-2.0
// What every function of the C interface is made of: guard() turns exceptions into status codes,
// the rest turns C values into C++ ones and back. Arguments are named "function: argument".
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>

#include "quire/error.h"
#include "quire/quire.h"
#include "quire/tensor.h"

namespace quire::c {

QuireStatus current_exception_status() noexcept;  // and its message for quire_last_error()

// `body` returns nothing (then the status is QUIRE_OK) or a status.
template <class Body>
QuireStatus guard(Body body) noexcept {
  try {
    if constexpr (std::is_void_v<decltype(body())>)
      body();
    else
      return body();
  } catch (...) {
    return current_exception_status();
  }
  return QUIRE_OK;
}

template <class T>
T& deref(const char* argument, T* pointer) {
  QUIRE_CHECK_ARG(pointer, argument, ": expected a pointer, got NULL");
  return *pointer;
}

template <class T>
std::span<T> as_span(const char* argument, T* data, size_t size) {
  QUIRE_CHECK_ARG(data || size == 0, argument, ": expected ", size, " elements, got NULL");
  return {data, size};
}

// More than any struct will have: a size beyond it was never set.
inline constexpr size_t kMaxStructSize = 4096;

template <class T>
size_t check_struct_size(const char* argument, const T* given) {
  const size_t size = deref(argument, given).struct_size;
  QUIRE_CHECK_ARG(size >= sizeof(size_t) && size <= kMaxStructSize, argument,
                  ": expected struct_size as its _INIT macro sets it, got ", size);
  return size;
}

// The caller's struct may be shorter than ours (then `value` has the defaults of what it lacks)
// or longer (then what we don't know must be 0).
template <class T>
T read_struct(const char* argument, const T* given, T value) {
  const size_t size = check_struct_size(argument, given);
  std::memcpy(&value, given, std::min(size, sizeof(T)));
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (size_t i = sizeof(T); i < size; ++i)
    QUIRE_CHECK_ARG(bytes[i] == 0, argument, ": expected the ", sizeof(T),
                    " bytes that this version knows, got an option after them");
  return value;
}

// After check_struct_size(), which comes before any work, this can't fail.
template <class T>
void write_struct(T value, T* out) {
  const size_t size = value.struct_size = out->struct_size;
  std::memcpy(out, &value, std::min(size, sizeof(T)));
  if (size > sizeof(T)) std::memset(reinterpret_cast<char*>(out) + sizeof(T), 0, size - sizeof(T));
}

template <class T>
void write_array(const char* argument, std::span<const T> values, T* buffer, size_t* size) {
  size_t& capacity = deref(argument, size);
  if (buffer) {
    QUIRE_CHECK_ARG(capacity >= values.size(), argument, ": expected room for ", values.size(),
                    " elements, got ", capacity);
    std::copy(values.begin(), values.end(), buffer);
  }
  capacity = values.size();
}

inline void write_string(const char* argument, const std::string& text, char* buffer,
                         size_t* size) {
  write_array<char>(argument, {text.c_str(), text.size() + 1}, buffer, size);
}

DType as_dtype(const char* argument, int32_t dtype);
Device as_device(const char* argument, int32_t type, int32_t index);

TensorView as_view(const char* argument, const QuireTensor* tensor);
TensorView as_optional_view(const char* argument, const QuireTensor* tensor);  // NULL: empty

}  // namespace quire::c
