// SPDX-License-Identifier: Apache-2.0
// The bytes of a log: writer, reader and check.
#include <algorithm>
#include <ostream>

#include "kv_store/crc32c.h"
#include "quire/call_log.h"
#include "quire/error.h"

namespace quire {
namespace {

constexpr char kMagic[] = {'q', 'u', 'i', 'r', 'e', 'l', 'o', 'g', 3};
constexpr auto kLastKind = LayerGroup::Kind::kState;

void put(std::string& out, int64_t value) {
  uint64_t rest = static_cast<uint64_t>(value) << 1 ^ static_cast<uint64_t>(value >> 63);
  for (; rest >= 128; rest >>= 7) out.push_back(static_cast<char>(rest | 128));
  out.push_back(static_cast<char>(rest));
}

void put_list(std::string& out, const std::vector<int32_t>& values) {
  put(out, static_cast<int64_t>(values.size()));
  for (int32_t value : values) put(out, value);
}

}  // namespace

uint32_t ResultCheck::value() const { return crc32c(bytes_); }

CallLogWriter::CallLogWriter(std::ostream& out, const CallLogConfig& config) : out_(out) {
  buffer_.assign(kMagic, sizeof kMagic);
  put(buffer_, config.num_blocks);
  put(buffer_, config.block_size);
  put(buffer_, config.prefix_caching);
  put(buffer_, config.async_depth);
  const KVCacheOptions& options = config.options;
  put(buffer_, static_cast<int64_t>(options.eviction));
  put(buffer_, options.event_capacity);
  put(buffer_, options.num_host_blocks);
  put(buffer_, static_cast<int64_t>(options.groups.size()));
  for (const LayerGroup& group : options.groups) {
    put(buffer_, static_cast<int64_t>(group.kind));
    put(buffer_, group.size);
  }
  out_.write(buffer_.data(), static_cast<std::streamsize>(buffer_.size())).flush();
}

void CallLogWriter::write(const LoggedCall& call) {
  buffer_.assign(1, static_cast<char>(call.operation | call.outcome << 5));
  put(buffer_, static_cast<int64_t>(call.seqs.size()));
  int64_t last = 0;
  for (int64_t seq : call.seqs) {
    put(buffer_, seq - last);
    last = seq;
  }
  put_list(buffer_, call.values);
  put_list(buffer_, call.counts);
  put(buffer_, call.salt ? static_cast<int64_t>(call.salt->size()) + 1 : 0);
  if (call.salt) buffer_ += *call.salt;
  put(buffer_, call.number);
  for (int shift = 0; shift < 32; shift += 8)
    buffer_.push_back(static_cast<char>(call.check >> shift));
  out_.write(buffer_.data(), static_cast<std::streamsize>(buffer_.size())).flush();
}

void CallLogWriter::end() { out_.setstate(std::ios_base::badbit); }

CallLogReader::CallLogReader(std::span<const std::byte> log) : rest_(log) {
  const auto magic = std::as_bytes(std::span(kMagic));
  QUIRE_CHECK_ARG(log.size() >= magic.size() && std::equal(magic.begin(), magic.end(), log.begin()),
                  "replay: log: expected a call log of version 3, got something else");
  rest_ = rest_.subspan(magic.size());
  const auto next = [&](int32_t most) {
    int64_t value;
    QUIRE_CHECK_ARG(get(value) && value >= 0 && value <= most,
                    "replay: log: expected the shape of a manager behind the version");
    return static_cast<int32_t>(value);
  };
  config_.num_blocks = next(INT32_MAX);
  config_.block_size = next(INT32_MAX);
  config_.prefix_caching = next(1) != 0;
  config_.async_depth = next(INT32_MAX);
  KVCacheOptions& options = config_.options;
  options.eviction = static_cast<Eviction>(next(static_cast<int32_t>(Eviction::kReuseLru)));
  options.event_capacity = next(INT32_MAX);
  options.num_host_blocks = next(INT32_MAX);
  for (int32_t left = next(INT32_MAX); left > 0; --left) {
    const auto kind = static_cast<LayerGroup::Kind>(next(static_cast<int32_t>(kLastKind)));
    options.groups.push_back({kind, next(INT32_MAX)});
  }
}

bool CallLogReader::get(int64_t& value) {
  uint64_t bits = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    if (rest_.empty()) return false;
    const auto byte = static_cast<uint64_t>(rest_[0]);
    rest_ = rest_.subspan(1);
    bits |= (byte & 127) << shift;
    if (byte < 128) {
      value = static_cast<int64_t>(bits >> 1 ^ (~(bits & 1) + 1));
      return true;
    }
  }
  return false;
}

bool CallLogReader::get_list(std::vector<int32_t>& values) {
  int64_t size;
  if (!get(size) || size < 0 || size > static_cast<int64_t>(rest_.size())) return false;
  values.clear();
  for (int64_t value; size > 0; --size) {
    if (!get(value) || value != static_cast<int32_t>(value)) return false;
    values.push_back(static_cast<int32_t>(value));
  }
  return true;
}

bool CallLogReader::read(LoggedCall& call) {
  if (rest_.empty()) return false;
  const auto head = static_cast<uint8_t>(rest_[0]);
  rest_ = rest_.subspan(1);
  if ((head & 31) > LoggedCall::kLastOperation || head >> 5 > LoggedCall::kRefused) return false;
  call.operation = static_cast<LoggedCall::Operation>(head & 31);
  call.outcome = static_cast<LoggedCall::Outcome>(head >> 5);
  int64_t num_seqs, salt_size;
  if (!get(num_seqs) || num_seqs < 0 || num_seqs > static_cast<int64_t>(rest_.size())) return false;
  call.seqs.clear();
  uint64_t last = 0;  // wraps in nonsense
  for (int64_t difference; num_seqs > 0; --num_seqs) {
    if (!get(difference)) return false;
    last += static_cast<uint64_t>(difference);
    call.seqs.push_back(static_cast<int64_t>(last));
  }
  if (!get_list(call.values) || !get_list(call.counts) || !get(salt_size)) return false;
  if (salt_size < 0 || salt_size > static_cast<int64_t>(rest_.size()) + 1) return false;
  call.salt.reset();
  if (salt_size > 0) {
    const auto size = static_cast<size_t>(salt_size - 1);
    call.salt.emplace(reinterpret_cast<const char*>(rest_.data()), size);
    rest_ = rest_.subspan(size);
  }
  if (!get(call.number) || rest_.size() < 4) return false;
  call.check = 0;
  for (int i = 0; i < 4; ++i) call.check |= static_cast<uint32_t>(rest_[i]) << (8 * i);
  rest_ = rest_.subspan(4);
  return true;
}

}  // namespace quire
