// SPDX-License-Identifier: Apache-2.0
#include "quire/chain_key.h"

#include <bit>
#include <vector>

#include "quire/error.h"
#include "sha256.h"

namespace quire {
namespace {

static_assert(std::endian::native == std::endian::little,
              "tokens are hashed as they lie in memory");

// The message of one block, padded: key of the block before, tokens, padding. Only the first two
// change from block to block.
class BlockMessage {
 public:
  explicit BlockMessage(size_t num_tokens)
      : num_token_bytes_(num_tokens * sizeof(int32_t)),
        buffer_(sha256::padded_size(sizeof(ChainKey) + num_token_bytes_)) {
    sha256::pad(buffer_, sizeof(ChainKey) + num_token_bytes_);
  }

  ChainKey key(const ChainKey& parent, const int32_t* tokens) {
    std::memcpy(buffer_.data(), parent.bytes.data(), sizeof parent);
    if (num_token_bytes_ > 0) std::memcpy(buffer_.data() + sizeof parent, tokens, num_token_bytes_);
    ChainKey key;
    hash_(buffer_.data(), buffer_.size() / sha256::kChunk, key.bytes.data());
    return key;
  }

 private:
  size_t num_token_bytes_;
  std::vector<uint8_t> buffer_;
  sha256::Hash hash_ = sha256::hash();
};

ChainKey key_of(std::string_view message) {
  std::vector<uint8_t> buffer(sha256::padded_size(message.size()));
  std::memcpy(buffer.data(), message.data(), message.size());
  sha256::pad(buffer, message.size());
  ChainKey key;
  sha256::hash()(buffer.data(), buffer.size() / sha256::kChunk, key.bytes.data());
  return key;
}

}  // namespace

ChainKey root_key(std::optional<std::string_view> salt) {
  std::string message = "quire.chain_key.v1\n";
  if (salt) message.append("salt=").append(*salt);
  return key_of(message);
}

ChainKey group_key(const ChainKey& key, int32_t group) {
  std::string message = "quire.group_key.v1\n";
  message.append(reinterpret_cast<const char*>(key.bytes.data()), key.bytes.size());
  message.append(reinterpret_cast<const char*>(&group), sizeof group);
  return key_of(message);
}

ChainKey chain_key(const ChainKey& parent, std::span<const int32_t> tokens) {
  return BlockMessage(tokens.size()).key(parent, tokens.data());
}

void chain_keys(const ChainKey& parent, std::span<const int32_t> tokens, int32_t block_size,
                std::span<ChainKey> keys) {
  QUIRE_CHECK_ARG(block_size >= 1, "chain_keys: block_size: expected 1 or more, got ", block_size);
  const size_t size = static_cast<size_t>(block_size);
  QUIRE_CHECK_ARG(keys.size() == tokens.size() / size, "chain_keys: keys: expected room for ",
                  tokens.size() / size, ", one a full block, got ", keys.size());
  BlockMessage message(size);
  ChainKey last = parent;
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = last = message.key(last, &tokens[i * size]);
}

std::string to_hex(const ChainKey& key) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (uint8_t byte : key.bytes) text.append({kDigits[byte >> 4], kDigits[byte & 15]});
  return text;
}

const char* sha256_implementation() {
  return sha256::hash() == sha256::hash_portable ? "portable" : "sha_ni";
}

}  // namespace quire
