// SPDX-License-Identifier: Apache-2.0
#include "sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace quire::sha256 {
namespace {

uint32_t load_big_endian(const uint8_t* p) {
  return uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | uint32_t{p[3]};
}

#if defined(__x86_64__)
bool has_sha_ni() {
  unsigned eax, ebx, ecx, edx;
  const bool has_leaf = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0;
  return has_leaf && (ebx >> 29 & 1) != 0 && __builtin_cpu_supports("sse4.1");
}
#endif

Compress choose() {
#if defined(__x86_64__)
  if (has_sha_ni()) return compress_sha_ni;
#endif
  return compress_portable;
}

}  // namespace

const uint32_t kRoundConstants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

void compress_portable(const uint8_t* data, size_t num_chunks, uint32_t state[8]) {
  for (; num_chunks > 0; --num_chunks, data += kChunk) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) w[i] = load_big_endian(data + 4 * i);
    for (int i = 16; i < 64; ++i) {
      const uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + w[i - 7] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) +
             (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
    }
    uint32_t s[8];
    std::copy_n(state, 8, s);
    for (int i = 0; i < 64; ++i) {
      const uint32_t e = s[4], a = s[0];
      const uint32_t t1 = s[7] + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                          ((e & s[5]) ^ (~e & s[6])) + kRoundConstants[i] + w[i];
      const uint32_t t2 = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) +
                          ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
      std::memmove(s + 1, s, 7 * sizeof s[0]);
      s[4] += t1;
      s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; ++i) state[i] += s[i];
  }
}

Compress compress() {
  static const Compress chosen = choose();
  return chosen;
}

size_t pad(uint8_t* last, size_t count, uint64_t size) {
  const uint64_t num_bits = __builtin_bswap64(size * 8);
  const size_t end = (count + 1 + sizeof num_bits + kChunk - 1) / kChunk * kChunk;
  std::memset(last + count, 0, end - count);
  last[count] = 0x80;
  std::memcpy(last + end - sizeof num_bits, &num_bits, sizeof num_bits);
  return end;
}

// In vectors: words would lie in the way of the next message, which reads several at once.
void write_digest(const uint32_t state[8], uint8_t digest[32]) {
  static_assert(std::endian::native == std::endian::little, "both are written the other way round");
  typedef uint32_t Words __attribute__((vector_size(16)));
  for (int i : {0, 4}) {
    Words words;
    std::memcpy(&words, state + i, sizeof words);
    words = words >> 24 | (words >> 8 & 0xff00) | (words << 8 & 0xff0000) | words << 24;
    std::memcpy(digest + 4 * i, &words, sizeof words);
  }
}

Message& Message::add(const void* data, size_t size) {
  const uint8_t* from = static_cast<const uint8_t*>(data);
  size_ += size;
  while (size > 0) {
    const size_t count = std::min(size, kRoom - num_buffered_);
    std::memcpy(buffer_ + num_buffered_, from, count);
    num_buffered_ += count;
    from += count;
    size -= count;
    if (num_buffered_ == kRoom) {
      compress_(buffer_, kRoom / kChunk, state_);
      num_buffered_ = 0;
    }
  }
  return *this;
}

void Message::finish(uint8_t digest[32]) {
  compress_(buffer_, pad(buffer_, num_buffered_, size_) / kChunk, state_);
  write_digest(state_, digest);
}

}  // namespace quire::sha256
