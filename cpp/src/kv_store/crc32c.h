// SPDX-License-Identifier: Apache-2.0
// CRC-32C (Castagnoli, as in iSCSI): finds torn and rotten files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace quire {

uint32_t crc32c(std::span<const std::byte> data);           // the fastest on this CPU
uint32_t crc32c_portable(std::span<const std::byte> data);  // the same

}  // namespace quire
