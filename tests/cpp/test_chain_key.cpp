// SPDX-License-Identifier: Apache-2.0
// Chain keys: published vectors of SHA-256, both implementations, and the chain itself.
#include <doctest/doctest.h>

#include <random>
#include <string>
#include <vector>

#include "quire/chain_key.h"
#include "quire/error.h"
#include "sha256.h"

using namespace quire;

namespace {

ChainKey digest(sha256::Compress compress, const std::string& message) {
  ChainKey key;
  sha256::Message(compress).add(message.data(), message.size()).finish(key.bytes.data());
  return key;
}

std::string as_bytes(const ChainKey& key) { return {key.bytes.begin(), key.bytes.end()}; }

std::string as_bytes(std::span<const int32_t> tokens) {
  return {reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes()};
}

std::vector<int32_t> random_tokens(size_t count) {
  std::mt19937 random(1);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random());
  return tokens;
}

}  // namespace

TEST_CASE("the examples of the standard") {
  for (sha256::Compress compress : {sha256::compress_portable, sha256::compress()}) {
    CHECK(to_hex(digest(compress, "abc")) ==
          "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(to_hex(digest(compress, "")) ==
          "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(to_hex(digest(compress, "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")) ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    CHECK(to_hex(digest(compress, std::string(1000000, 'a'))) ==
          "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  }
}

TEST_CASE("both implementations agree at every length around a chunk's edge") {
  for (size_t size = 0; size < 1200; ++size) {
    const std::string message(size, static_cast<char>(size));
    CHECK(digest(sha256::compress_portable, message) == digest(sha256::compress(), message));
  }
}

TEST_CASE("a message in pieces is the message") {
  std::mt19937 random(2);
  for (int i = 0; i < 200; ++i) {
    std::string whole;
    sha256::Message message;
    for (uint32_t n = random() % 5; n > 0; --n) {
      const std::string piece(random() % 700, static_cast<char>(random()));
      message.add(piece.data(), piece.size());
      whole += piece;
    }
    ChainKey key;
    message.finish(key.bytes.data());
    CHECK(key == digest(sha256::compress(), whole));
  }
}

TEST_CASE("a key is the hash of the key before it and the tokens, from the root of the salt on") {
  const std::string version = "quire.chain_key.v1\n";
  CHECK(root_key() == digest(sha256::compress(), version));
  CHECK(root_key("") == digest(sha256::compress(), version + "salt="));
  CHECK(root_key("me") == digest(sha256::compress(), version + "salt=me"));
  for (int32_t block_size : {1, 5, 16, 128}) {
    const std::vector<int32_t> tokens = random_tokens(3 * block_size + block_size / 2);
    std::vector<ChainKey> keys(tokens.size() / block_size);
    chain_keys(root_key("me"), tokens, block_size, keys);
    ChainKey last = root_key("me");
    for (size_t i = 0; i < keys.size(); ++i) {
      const auto block = std::span(tokens).subspan(i * block_size, block_size);
      CHECK(keys[i] == digest(sha256::compress(), as_bytes(last) + as_bytes(block)));
      CHECK(keys[i] == chain_key(last, block));
      last = keys[i];
    }
  }
}

TEST_CASE("the format is fixed: these bits must never change under version 1") {
  const int32_t tokens[] = {1, -2, 0x01020304};
  CHECK(to_hex(chain_key(root_key("tenant"), tokens)) ==
        "6ed07c8b5e19e59d5cfce69bcf9e2e8c6fa568209701bd2e56d8143f228925cc");
}

TEST_CASE("bad arguments are refused by name") {
  std::vector<ChainKey> keys(2);
  const std::vector<int32_t> tokens = random_tokens(16);
  CHECK_THROWS_WITH_AS(chain_keys(root_key(), tokens, 0, keys),
                       "chain_keys: block_size: expected 1 or more, got 0", InvalidArgument);
  CHECK_THROWS_WITH_AS(chain_keys(root_key(), tokens, 4, keys),
                       "chain_keys: keys: expected room for 4, one a full block, got 2",
                       InvalidArgument);
}
