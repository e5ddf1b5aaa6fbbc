// SPDX-License-Identifier: Apache-2.0
#include "quire/chain_key.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "quire/error.h"
#include "sha256.h"

namespace quire {
namespace {

static_assert(std::endian::native == std::endian::little,
              "tokens are hashed as they lie in memory");

ChainKey key_of(sha256::Message& message) {
  ChainKey key;
  message.finish(key.bytes.data());
  return key;
}

// The message of one block after the other, padded: key of the block before, tokens, padding. Only
// the first two change from block to block.
class BlockMessage {
 public:
  static constexpr size_t kMaxTokens = 256;

  BlockMessage(const ChainKey& parent, size_t num_tokens)
      : token_bytes_(num_tokens * sizeof(int32_t)) {
    const size_t size = sizeof parent + token_bytes_;
    std::memcpy(buffer_, parent.bytes.data(), sizeof parent);
    num_chunks_ = sha256::pad(buffer_, size, size) / sha256::kChunk;
  }

  ChainKey next_key(const int32_t* tokens) {
    std::memcpy(buffer_ + sizeof(ChainKey), tokens, token_bytes_);
    uint32_t state[8];
    std::copy_n(sha256::kInitialState, 8, state);
    compress_(buffer_, num_chunks_, state);
    sha256::write_digest(state, buffer_);
    ChainKey key;
    std::memcpy(key.bytes.data(), buffer_, sizeof key);
    return key;
  }

 private:
  size_t token_bytes_, num_chunks_;
  sha256::Compress compress_ = sha256::compress();
  uint8_t buffer_[sizeof(ChainKey) + kMaxTokens * sizeof(int32_t) + 2 * sha256::kChunk];
};

}  // namespace

ChainKey root_key(std::optional<std::string_view> salt) {
  constexpr std::string_view kBegin = "quire.chain_key.v1\n", kSalt = "salt=";
  sha256::Message message;
  message.add(kBegin.data(), kBegin.size());
  if (salt) message.add(kSalt.data(), kSalt.size()).add(salt->data(), salt->size());
  return key_of(message);
}

ChainKey group_key(const ChainKey& key, int32_t group) {
  constexpr std::string_view kBegin = "quire.group_key.v1\n";
  sha256::Message message;
  message.add(kBegin.data(), kBegin.size());
  message.add(key.bytes.data(), key.bytes.size()).add(&group, sizeof group);
  return key_of(message);
}

ChainKey chain_key(const ChainKey& parent, std::span<const int32_t> tokens) {
  sha256::Message message;
  message.add(parent.bytes.data(), parent.bytes.size()).add(tokens.data(), tokens.size_bytes());
  return key_of(message);
}

void chain_keys(const ChainKey& parent, std::span<const int32_t> tokens, int32_t block_size,
                std::span<ChainKey> keys) {
  QUIRE_CHECK_ARG(block_size >= 1, "chain_keys: block_size: expected 1 or more, got ", block_size);
  const size_t size = static_cast<size_t>(block_size);
  QUIRE_CHECK_ARG(keys.size() == tokens.size() / size, "chain_keys: keys: expected room for ",
                  tokens.size() / size, ", one a full block, got ", keys.size());
  if (size > BlockMessage::kMaxTokens) {
    for (size_t i = 0; i < keys.size(); ++i)
      keys[i] = chain_key(i == 0 ? parent : keys[i - 1], tokens.subspan(i * size, size));
    return;
  }
  BlockMessage message(parent, size);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = message.next_key(&tokens[i * size]);
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
