// SPDX-License-Identifier: Apache-2.0
// What the tests of the stores share: keys, payloads, and a directory that goes away.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "quire/kv_store.h"

namespace store_case {

inline quire::ChainKey key_of(int32_t i) {
  return quire::chain_key(quire::root_key(), std::span(&i, 1));
}

inline std::vector<std::byte> payload_of(int32_t i, size_t size) {
  std::mt19937 random(static_cast<uint32_t>(i));
  std::vector<std::byte> payload(size);
  for (std::byte& b : payload) b = static_cast<std::byte>(random());
  return payload;
}

// kPending: not taken.
inline quire::KVOutcome put(quire::KVStore& store, int32_t i) {
  const auto payload = payload_of(i, store.block_bytes());
  const auto ticket = store.put(key_of(i), payload);
  return ticket ? ticket->wait() : quire::KVOutcome::kPending;
}

// kMissing, or kDone with the right bytes; kFailed stands for wrong bytes.
inline quire::KVOutcome get(quire::KVStore& store, int32_t i) {
  std::vector<std::byte> out(store.block_bytes());
  const auto ticket = store.get(key_of(i), out);
  if (!ticket) return quire::KVOutcome::kPending;
  const quire::KVOutcome outcome = ticket->wait();
  if (outcome != quire::KVOutcome::kDone) return outcome;
  return out == payload_of(i, store.block_bytes()) ? outcome : quire::KVOutcome::kFailed;
}

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "quire-store-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

  std::vector<std::filesystem::path> block_files() const {
    return files([](const auto& path) { return path.extension() == ".kv"; });
  }
  std::vector<std::filesystem::path> unfinished_files() const {
    return files([](const auto& path) { return path.filename().string().starts_with("unf"); });
  }

 private:
  template <class Wanted>
  std::vector<std::filesystem::path> files(Wanted is_wanted) const {
    std::vector<std::filesystem::path> found;
    for (const auto& entry : std::filesystem::directory_iterator(path_))
      if (is_wanted(entry.path())) found.push_back(entry.path());
    return found;
  }

  std::string path_;
};

}  // namespace store_case
