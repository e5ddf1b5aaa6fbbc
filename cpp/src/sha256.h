// SPDX-License-Identifier: Apache-2.0
// SHA-256 (FIPS 180-4): the hash of whole messages, padded by the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace quire::sha256 {

inline constexpr size_t kChunk = 64;  // bytes that one compression takes
inline constexpr uint32_t kInitialState[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                              0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
extern const uint32_t kRoundConstants[64];

// The digest of a padded message of num_chunks chunks.
using Hash = void (*)(const uint8_t* data, size_t num_chunks, uint8_t digest[32]);

void hash_portable(const uint8_t* data, size_t num_chunks, uint8_t digest[32]);
#if defined(__x86_64__)
void hash_sha_ni(const uint8_t* data, size_t num_chunks, uint8_t digest[32]);
#endif

// The fastest on this CPU, chosen at the first call.
Hash hash();

constexpr size_t padded_size(size_t size) { return (size + 9 + kChunk - 1) / kChunk * kChunk; }

// Writes what follows a message of `size` bytes into buffer [padded_size(size)].
void pad(std::span<uint8_t> buffer, size_t size);

}  // namespace quire::sha256
