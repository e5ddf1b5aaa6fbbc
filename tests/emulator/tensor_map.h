// SPDX-License-Identifier: Apache-2.0
// What the emulator keeps in the 128 opaque bytes of a tensor map: a tensor of 16-bit elements of
// rank 4, and the box of it that a copy brings.
#pragma once

#include <cstdint>
#include <cstring>

namespace quire::emulator {

struct TensorMapCode {
  static constexpr int kRank = 4;
  static constexpr uint64_t kMagic = 0x70616d2d72736e74;

  uint64_t magic = kMagic;
  const uint8_t* base = nullptr;
  uint64_t dims[kRank];         // elements, the contiguous one first
  uint64_t strides[kRank - 1];  // bytes, of all but the first
  uint32_t box[kRank];          // elements

  bool is_valid() const { return magic == kMagic; }
};
static_assert(sizeof(TensorMapCode) <= 128);

// Fills the 128 bytes at `map`; false where cuTensorMapEncodeTiled would refuse 16-bit elements
// swizzled over 128 bytes.
inline bool encode_tensor_map(void* map, const void* base, const uint64_t* dims,
                              const uint64_t* strides, const uint32_t* box) {
  TensorMapCode code;
  code.base = static_cast<const uint8_t*>(base);
  bool is_valid = reinterpret_cast<uintptr_t>(base) % 16 == 0 && box[0] * 2 <= 128;
  for (int i = 0; i < TensorMapCode::kRank; ++i) {
    code.dims[i] = dims[i];
    code.box[i] = box[i];
    is_valid &= dims[i] > 0 && dims[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256;
    if (i == 0) continue;
    code.strides[i - 1] = strides[i - 1];
    is_valid &= strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t{1} << 40;
  }
  std::memset(map, 0, 128);
  std::memcpy(map, &code, sizeof code);
  return is_valid && box[0] * 2 % 16 == 0;
}

}  // namespace quire::emulator
