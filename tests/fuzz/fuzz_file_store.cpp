// SPDX-License-Identifier: Apache-2.0
// The input is laid over a good block file, at an offset of its own choice, or is the whole file.
// What is called good must be, byte by byte, the file of the payload that came out. (The fuzzer
// finds right checksums: they tell rot, not forgery.)
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "kv_store/block_file.h"
#include "store_case.h"

namespace {

constexpr size_t kBlockBytes = 40;

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// The bytes of the file of a payload.
std::string file_of(const std::string& folder, std::span<const std::byte> payload) {
  const std::string path = folder + "/good";
  if (!quire::write_block_file(path, store_case::key_of(0), payload)) std::abort();
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const store_case::TemporaryFolder folder;
  static const std::string good = file_of(folder.path(), store_case::payload_of(0, kBlockBytes));
  static const std::string path = folder.path() + "/block";
  const quire::ChainKey key = store_case::key_of(0);

  const std::string input(reinterpret_cast<const char*>(data), size);
  quire::parse_block_file_name(input);
  std::string bytes = input;
  if (size > 1 && data[0] < good.size()) {  // 255: the input itself
    bytes = good;
    const size_t count = std::min(size - 1, good.size() - data[0]);
    bytes.replace(data[0], count, input.substr(1, count));
  }
  write_file(path, bytes);
  std::vector<std::byte> out(kBlockBytes);
  const auto state = quire::read_block_file(path, key, out);
  if (bytes == good && state != quire::BlockFileState::kGood) std::abort();
  if (state == quire::BlockFileState::kGood && bytes != file_of(folder.path(), out)) std::abort();
  return 0;
}
