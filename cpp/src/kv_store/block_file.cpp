// SPDX-License-Identifier: Apache-2.0
#include "kv_store/block_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <system_error>

#include "kv_store/crc32c.h"

namespace quire {
namespace {

struct Header {
  char magic[8] = {'q', 'u', 'i', 'r', 'e', 'k', 'v', '1'};
  uint32_t header_crc = 0;
  uint32_t payload_crc = 0;
  uint64_t payload_bytes = 0;
  ChainKey key;
  uint8_t zeros[8] = {};
};
static_assert(sizeof(Header) == kBlockFileHeader);

Header make_header(const ChainKey& key, std::span<const std::byte> payload) {
  Header header;
  header.payload_crc = crc32c(payload);
  header.payload_bytes = payload.size();
  header.key = key;
  header.header_crc = crc32c(std::as_bytes(std::span(&header, 1)).subspan(16));
  return header;
}

[[noreturn]] void throw_errno(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

constexpr ssize_t kInterrupted = -1;

// Runs transfer(iovec*, count) until both parts are through; false: the file ended before.
template <class Transfer>
bool transfer_all(const std::string& path, iovec (&parts)[2], Transfer transfer) {
  iovec* part = parts;
  while (part != std::end(parts)) {
    if (part->iov_len == 0) {
      ++part;
      continue;
    }
    const ssize_t count = transfer(part, static_cast<int>(std::end(parts) - part));
    if (count == kInterrupted) {
      if (errno == EINTR) continue;
      throw_errno(path);
    }
    if (count == 0) return false;
    for (size_t left = static_cast<size_t>(count); left > 0; part += left > 0) {
      const size_t taken = std::min(left, part->iov_len);
      part->iov_base = static_cast<char*>(part->iov_base) + taken;
      part->iov_len -= taken;
      left -= taken;
    }
  }
  return true;
}

void write_all(const std::string& path, const File& file, std::span<const std::byte> first,
               std::span<const std::byte> second) {
  iovec parts[2] = {{const_cast<std::byte*>(first.data()), first.size()},
                    {const_cast<std::byte*>(second.data()), second.size()}};
  transfer_all(path, parts, [&](iovec* part, int n) { return ::writev(file.fd(), part, n); });
}

int hex_value(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

}  // namespace

File::File(const std::string& path, int flags, Missing missing)
    : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {
  if (fd_ < 0 && !(missing == kMayMiss && errno == ENOENT)) throw_errno(path);
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

std::string block_file_name(const BlockFileName& name) {
  char age[17];
  std::snprintf(age, sizeof age, "%016llx", static_cast<unsigned long long>(name.age));
  return std::string(age) + "-" + to_hex(name.key) + ".kv";
}

std::optional<BlockFileName> parse_block_file_name(std::string_view name) {
  if (name.size() != 16 + 1 + 64 + 3 || name[16] != '-' || name.substr(81) != ".kv")
    return std::nullopt;
  BlockFileName result{};
  for (int i = 0; i < 80; ++i) {
    const int value = hex_value(name[i < 16 ? i : i + 1]);
    if (value < 0) return std::nullopt;
    if (i < 16)
      result.age = result.age << 4 | static_cast<uint64_t>(value);
    else
      result.key.bytes[(i - 16) / 2] |= static_cast<uint8_t>(i % 2 ? value : value << 4);
  }
  return result;
}

std::vector<BlockFileName> list_block_files(const std::string& folder) {
  const auto close = [](DIR* stream) { ::closedir(stream); };
  const std::unique_ptr<DIR, decltype(close)> stream(::opendir(folder.c_str()), close);
  if (!stream) throw_errno(folder);
  std::vector<BlockFileName> names;
  while (const dirent* entry = ::readdir(stream.get()))
    if (const auto name = parse_block_file_name(entry->d_name)) names.push_back(*name);
  return names;
}

void write_synced(const std::string& path, std::span<const std::byte> bytes) {
  const File file(path, O_WRONLY | O_CREAT | O_TRUNC);
  write_all(path, file, bytes, {});
  if (::fsync(file.fd()) != 0) throw_errno(path);
}

std::unique_ptr<File> write_block_file(const std::string& path, const ChainKey& key,
                                       std::span<const std::byte> payload) try {
  const Header header = make_header(key, payload);
  auto file = std::make_unique<File>(path, O_WRONLY | O_CREAT | O_TRUNC);
  write_all(path, *file, std::as_bytes(std::span(&header, 1)), payload);
  return file;
} catch (const std::system_error&) {
  return nullptr;
}

BlockFileState read_block_file(const std::string& path, const ChainKey& key,
                               std::span<std::byte> out) {
  const File file(path, O_RDONLY, File::kMayMiss);
  if (!file.is_open()) return BlockFileState::kAbsent;
  struct stat status;
  if (::fstat(file.fd(), &status) != 0) throw_errno(path);
  if (static_cast<uint64_t>(status.st_size) != sizeof(Header) + out.size())
    return BlockFileState::kBad;
  Header header;
  iovec parts[2] = {{&header, sizeof header}, {out.data(), out.size()}};
  if (!transfer_all(path, parts, [&](iovec* part, int n) { return ::readv(file.fd(), part, n); }))
    return BlockFileState::kBad;
  const Header expected = make_header(key, out);
  return std::memcmp(&header, &expected, sizeof header) == 0 ? BlockFileState::kGood
                                                             : BlockFileState::kBad;
}

}  // namespace quire
