// SPDX-License-Identifier: Apache-2.0
// The file of one block: 64 bytes of header, then the payload. Little-endian. Everything read from
// a file or its name is untrusted.
//
//   0  "quirekv1"    8  uint32 CRC-32C of bytes 16 ... 63    12  uint32 CRC-32C of the payload
//   16 uint64 payload bytes    24 chain key [32]    56  zeros
//
// Its name is "<age: 16 hex digits>-<chain key: 64 hex digits>.kv"; ages rise with every put.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quire/chain_key.h"

namespace quire {

// Closes when it goes.
class File {
 public:
  // Throws std::system_error, or with kMayMiss gives a File that is not open.
  enum Missing { kThrow, kMayMiss };
  File(const std::string& path, int flags, Missing missing = kThrow);
  File(const File&) = delete;
  ~File();
  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }

 private:
  int fd_;
};

struct BlockFileName {
  uint64_t age;
  ChainKey key;
};

std::string block_file_name(const BlockFileName& name);
std::optional<BlockFileName> parse_block_file_name(std::string_view name);

// Of all block files in a directory, in no order. Throws std::system_error.
std::vector<BlockFileName> list_block_files(const std::string& folder);

inline constexpr size_t kBlockFileHeader = 64;

// Writes and syncs a whole file. Throws std::system_error.
void write_synced(const std::string& path, std::span<const std::byte> bytes);

// Writes a file that is still to be synced. Null: it failed, for example on a full disk.
std::unique_ptr<File> write_block_file(const std::string& path, const ChainKey& key,
                                       std::span<const std::byte> payload);

enum class BlockFileState { kGood, kAbsent, kBad };

// Fills `out` with the payload; kBad is a file that is not exactly what write_block_file() made of
// this key and a payload of this size. Then `out` may hold anything.
BlockFileState read_block_file(const std::string& path, const ChainKey& key,
                               std::span<std::byte> out);

}  // namespace quire
