// SPDX-License-Identifier: Apache-2.0
// SHA-256 (FIPS 180-4), without memory of its own making.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quire::sha256 {

inline constexpr size_t kChunk = 64;  // bytes that one compression takes
inline constexpr uint32_t kInitialState[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                              0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
extern const uint32_t kRoundConstants[64];

// Takes num_chunks more chunks of a message into its state.
using Compress = void (*)(const uint8_t* data, size_t num_chunks, uint32_t state[8]);

void compress_portable(const uint8_t* data, size_t num_chunks, uint32_t state[8]);
#if defined(__x86_64__)
void compress_sha_ni(const uint8_t* data, size_t num_chunks, uint32_t state[8]);
#endif

// The fastest on this CPU, chosen at the first call.
Compress compress();

// Behind the last `count` bytes of a message of `size`, which begin a chunk: a bit, zeros, and the
// size in bits, to the end of a chunk. Returns how many bytes there are then, up to 72 more.
size_t pad(uint8_t* last, size_t count, uint64_t size);

void write_digest(const uint32_t state[8], uint8_t digest[32]);

// A message, piece by piece. Nothing here throws: keys are made where nothing may.
class Message {
 public:
  explicit Message(Compress compress = sha256::compress()) : compress_(compress) {}
  Message& add(const void* data, size_t size);
  void finish(uint8_t digest[32]);  // and nothing after it

 private:
  static constexpr size_t kRoom = 16 * kChunk;  // compressed together

  Compress compress_;
  uint64_t size_ = 0;        // bytes so far,
  size_t num_buffered_ = 0;  // and how many of them are not in the state
  uint32_t state_[8] = {kInitialState[0], kInitialState[1], kInitialState[2], kInitialState[3],
                        kInitialState[4], kInitialState[5], kInitialState[6], kInitialState[7]};
  uint8_t buffer_[kRoom + kChunk];  // with room for padding
};

}  // namespace quire::sha256
