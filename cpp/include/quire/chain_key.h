// SPDX-License-Identifier: Apache-2.0
// ChainKey: the name of a block's contents, the same in every process and on every machine.
//
// Version 1 of the format, with SHA-256 (FIPS 180-4) throughout:
//   root key   SHA256("quire.chain_key.v1\n")                    for no salt
//              SHA256("quire.chain_key.v1\nsalt=" || salt)       for a salt, also an empty one
//   block key  SHA256(key of the block before, or the root key: 32 bytes
//                     || the block's tokens: int32, little-endian)
//   group key  SHA256("quire.group_key.v1\n" || block key || group: int32, little-endian)
//              for what a layer group but the first keeps beside that block
// So a key stands for a block and everything before it: equal keys, equal prefixes. A change of
// any of this changes the version in the root key, and old keys are never found again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace quire {

struct ChainKey {
  std::array<uint8_t, 32> bytes{};
  friend bool operator==(const ChainKey&, const ChainKey&) = default;
};

// For hash tables: a SHA-256 is as good as random in every part.
struct ChainKeyHash {
  size_t operator()(const ChainKey& key) const {
    size_t hash;
    std::memcpy(&hash, key.bytes.data(), sizeof hash);
    return hash;
  }
};

ChainKey root_key(std::optional<std::string_view> salt = {});

// The key of one block of any number of tokens after `parent`.
ChainKey chain_key(const ChainKey& parent, std::span<const int32_t> tokens);

// The keys of consecutive full blocks after `parent`: keys[i] of tokens [i * block_size,
// (i + 1) * block_size). Throws InvalidArgument unless keys.size() == tokens.size() / block_size.
void chain_keys(const ChainKey& parent, std::span<const int32_t> tokens, int32_t block_size,
                std::span<ChainKey> keys);

// Of what layer group `group`, 1 or more, keeps beside the block with this key.
ChainKey group_key(const ChainKey& key, int32_t group);

// 64 hexadecimal digits.
std::string to_hex(const ChainKey& key);

// "sha_ni" or "portable": what computes the keys on this CPU.
const char* sha256_implementation();

}  // namespace quire
