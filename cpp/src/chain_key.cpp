// SPDX-License-Identifier: Apache-2.0
#include "quire/chain_key.h"

#include <bit>
#include <utility>

#include "quire/error.h"
#include "sha256.h"

namespace quire {
namespace {

static_assert(std::endian::native == std::endian::little,
              "tokens are hashed as they lie in memory");

ChainKey key_of(sha256::Message&& message) {
  ChainKey key;
  message.finish(key.bytes.data());
  return key;
}

}  // namespace

ChainKey root_key(std::optional<std::string_view> salt) {
  constexpr std::string_view kBegin = "quire.chain_key.v1\n", kSalt = "salt=";
  sha256::Message message;
  message.add(kBegin.data(), kBegin.size());
  if (salt) message.add(kSalt.data(), kSalt.size()).add(salt->data(), salt->size());
  return key_of(std::move(message));
}

ChainKey group_key(const ChainKey& key, int32_t group) {
  constexpr std::string_view kBegin = "quire.group_key.v1\n";
  sha256::Message message;
  message.add(kBegin.data(), kBegin.size());
  message.add(key.bytes.data(), key.bytes.size()).add(&group, sizeof group);
  return key_of(std::move(message));
}

ChainKey chain_key(const ChainKey& parent, std::span<const int32_t> tokens) {
  sha256::Message message;
  message.add(parent.bytes.data(), parent.bytes.size()).add(tokens.data(), tokens.size_bytes());
  return key_of(std::move(message));
}

void chain_keys(const ChainKey& parent, std::span<const int32_t> tokens, int32_t block_size,
                std::span<ChainKey> keys) {
  QUIRE_CHECK_ARG(block_size >= 1, "chain_keys: block_size: expected 1 or more, got ", block_size);
  const size_t size = static_cast<size_t>(block_size);
  QUIRE_CHECK_ARG(keys.size() == tokens.size() / size, "chain_keys: keys: expected room for ",
                  tokens.size() / size, ", one a full block, got ", keys.size());
  ChainKey last = parent;
  for (size_t i = 0; i < keys.size(); ++i)
    keys[i] = last = chain_key(last, tokens.subspan(i * size, size));
}

std::string to_hex(const ChainKey& key) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (uint8_t byte : key.bytes) text.append({kDigits[byte >> 4], kDigits[byte & 15]});
  return text;
}

const char* sha256_implementation() {
  return sha256::compress() == sha256::compress_portable ? "portable" : "sha_ni";
}

}  // namespace quire
